// What survives a reload: the conversation and the form, in this browser; the API key, in this tab alone.

const STATE = "edge-phi3.playground";
const THEME = "edge-phi3.theme";
const KEY = "edge-phi3.key";

/**
 * @typedef {object} Exchange A question and what came of it.
 * @property {string} user
 * @property {string[]} answers one text for each returned sequence
 * @property {"running"|"done"|"stopped"|"failed"} status
 * @property {string|null} error the service's sentence
 * @property {object|null} facts see answer.js
 */

/** The page's state. `parameters` maps a name to its value as JSON source; null until the form's start is known. */
export const state = { exchanges: [], system: "", schema: "", tools: "", draft: "", parameters: null };

/** Read what was kept. */
export function load() {
  try {
    const kept = JSON.parse(localStorage.getItem(STATE) ?? "{}");
    for (const name of Object.keys(state)) if (name in kept) state[name] = kept[name];
  } catch {
    return;
  }
  for (const exchange of state.exchanges) if (exchange.status === "running") exchange.status = "stopped";
}

/** Keep the state as it is now. A full store loses the page's memory, not the page. */
export function save() {
  write(localStorage, STATE, JSON.stringify(state));
}

export const theme = { set: (value) => write(localStorage, THEME, value) };

export const apiKey = {
  get() {
    try {
      return sessionStorage.getItem(KEY) ?? "";
    } catch {
      return "";
    }
  },
  set: (value) => write(sessionStorage, KEY, value),
};

function write(store, name, value) {
  try {
    store.setItem(name, value);
  } catch {
    // Nothing can be kept: the store is full, or the browser's settings forbid it.
  }
}
