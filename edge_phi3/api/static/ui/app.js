// The playground: joins the state, the conversation, the form and the service.

import { factsOf } from "./answer.js";
import { Conversation } from "./conversation.js";
import { copy, el } from "./dom.js";
import { startPanel } from "./panel.js";
import { ParameterForm } from "./parameters.js";
import { bodyOf, curlOf, messagesOf, routeOf } from "./request.js";
import { apiKey, load, save, state, theme } from "./store.js";
import { chat, ServiceError } from "./stream.js";

const SUGGESTIONS = ["What does json.dumps do?", "What does os.path.join do?", "What does sorted do?"];
const READY_POLL = 2000;

const $ = (id) => document.getElementById(id);
const message = $("message");

load();
let config = { groups: [], parameters: {}, initial: {}, needs_key: false, end_token_ids: [] };
let form = null;
let running = null;
let leaving = false;
let nextWatch = 0;
const panel = startPanel();
const conversation = new Conversation($("conversation"), { again });

// -- asking

async function ask(exchange) {
  const before = state.exchanges.slice(0, state.exchanges.indexOf(exchange));
  const body = bodyOf(messagesOf(state.system, before, exchange.user), state.parameters ?? {}, state);
  const started = performance.now();
  let first = null;
  let firstChunk = null;
  let together = 0;
  let frame = 0;
  const draw = () => (frame ||= requestAnimationFrame(() => ((frame = 0), conversation.update(exchange))));
  const onPiece = (index, text, chunk) => {
    first ??= performance.now() - started;
    firstChunk ??= chunk;
    if (chunk === firstChunk) together += 1;
    while (exchange.answers.length <= index) exchange.answers.push("");
    exchange.answers[index] += text;
    draw();
  };
  running = new AbortController();
  showRunning(true);
  try {
    const result = await chat(routeOf(state), body, { key: apiKey.get(), signal: running.signal, onPiece });
    const times = { first, total: performance.now() - started };
    // Beam search sends no pieces, and its sequences as one text.
    if (first === null) exchange.answers = [result.Result ?? ""];
    exchange.facts = factsOf(result, JSON.parse(body).generate_kwargs, config.end_token_ids, times, together);
    exchange.status = "done";
    announce("The answer is complete.");
  } catch (error) {
    if (leaving) return;
    if (error.name === "AbortError") {
      exchange.status = "stopped";
      exchange.facts = { first, total: performance.now() - started, tokens: null, rate: null, reasons: [] };
      announce("Stopped.");
    } else if (error instanceof ServiceError) {
      exchange.status = "failed";
      exchange.error = error.message;
      if (error.status === 401) askForKey();
      if (error.status === 0 || error.status >= 500) watch();
    } else {
      exchange.status = "failed";
      exchange.error = `The page met an error of its own: ${error.message}`;
    }
  } finally {
    cancelAnimationFrame(frame);
    running = null;
    showRunning(false);
    conversation.update(exchange);
    if (!leaving) keep();
  }
}

function send() {
  const text = message.value.trim();
  if (!text || running) return;
  const exchange = fresh(text);
  state.exchanges.push(exchange);
  setDraft("");
  $("welcome").hidden = true;
  conversation.add(exchange);
  conversation.scrollToEnd();
  ask(exchange);
}

/** Ask the same question once more, with the present settings; what came after it is dropped. */
function again(exchange) {
  if (running) return;
  Object.assign(exchange, fresh(exchange.user));
  state.exchanges.length = state.exchanges.indexOf(exchange) + 1;
  conversation.show(state.exchanges);
  message.focus();
  ask(exchange);
}

function fresh(user) {
  return { user, answers: [], status: "running", error: null, facts: null };
}

function stop() {
  running?.abort();
  message.focus();
}

function newChat() {
  stop();
  state.exchanges = [];
  conversation.show([]);
  $("welcome").hidden = false;
  keep();
  message.focus();
}

// -- showing

function showRunning(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
  document.body.classList.toggle("running", on);
}

function announce(sentence) {
  $("announcement").textContent = sentence;
}

function askForKey() {
  panel.show(true);
  $("tab-settings").click();
  $("key-block").hidden = false;
  $("key").focus();
}

function setDraft(text) {
  message.value = state.draft = text;
  grow();
}

function grow() {
  message.style.height = "auto";
  message.style.height = `${message.scrollHeight}px`;
  $("send").disabled = !message.value.trim();
}

/** Show the request that comes next, and keep everything. */
function keep() {
  save();
  const draft = message.value.trim();
  const last = state.exchanges.at(-1);
  const question = draft || last?.user || SUGGESTIONS[0];
  const before = draft || !last ? state.exchanges : state.exchanges.slice(0, -1);
  const body = bodyOf(messagesOf(state.system, before, question), state.parameters ?? {}, state);
  $("curl").textContent = curlOf(routeOf(state), body, config.needs_key);
  if (draft) $("request-note").textContent = "Your next message as a command, with the present settings.";
  else if (last) $("request-note").textContent = "Your last message as a command, with the present settings.";
  else $("request-note").textContent = "An example until you have written a message, with the present settings.";
  const start = initial();
  const values = state.parameters ?? start;
  const names = new Set([...Object.keys(values), ...Object.keys(start)]);
  const changed = [...names].filter((name) => values[name] !== start[name]).length;
  $("count").hidden = changed === 0;
  $("count").textContent = changed;
  $("count").title = `${changed} changed`;
}

function initial() {
  return Object.fromEntries(Object.entries(config.initial).map(([name, value]) => [name, JSON.stringify(value)]));
}

// -- starting

async function getJSON(url) {
  const response = await fetch(url, { cache: "no-store" });
  return { ok: response.ok, content: await response.json() };
}

async function configure() {
  const { ok, content } = await getJSON("ui/config.json");
  if (!ok) throw new ServiceError(content.detail);
  config = content;
  $("key-block").hidden = !config.needs_key;
  state.parameters ??= initial();
  // What an older service took, this one may not know.
  for (const name of Object.keys(state.parameters)) if (!(name in config.parameters)) delete state.parameters[name];
  form ??= new ParameterForm($("parameters"), config, state.parameters, keep);
  keep();
}

/** Show what is served, and while the model loads how far that is. */
async function watch() {
  clearTimeout(nextWatch);
  let wait = READY_POLL;
  try {
    const ready = await getJSON("readyz");
    if (ready.ok) {
      await configure();
      const { content } = await getJSON("version");
      showModel("ready", content.model.name, `${content.model.description} · edge-phi3 ${content.version}`);
      wait = 0;
    } else {
      if (!form) await configure();
      showModel("loading", ready.content.detail);
    }
  } catch {
    showModel("away", "The service cannot be reached.");
  }
  clearTimeout(nextWatch);
  if (wait) nextWatch = setTimeout(watch, wait);
}

function showModel(status, text, title = "") {
  $("model").dataset.state = status;
  $("model").title = title;
  if ($("model-name").textContent !== text) $("model-name").textContent = text;
}

function toggleTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  theme.set(root.dataset.theme);
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
message.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
message.addEventListener("input", () => {
  state.draft = message.value;
  grow();
  keep();
});
for (const name of ["system", "schema", "tools"]) {
  $(name).addEventListener("input", () => {
    state[name] = $(name).value;
    keep();
  });
}
$("key").addEventListener("input", () => apiKey.set($("key").value.trim()));
$("filter").addEventListener("input", () => {
  form?.filter($("filter").value);
  $("none").hidden = [...document.querySelectorAll(".group")].some((group) => !group.hidden);
});
$("parameters").addEventListener("submit", (event) => event.preventDefault());
$("reset-all").addEventListener("click", () => {
  for (const name of Object.keys(state.parameters ?? {})) delete state.parameters[name];
  Object.assign(state.parameters ?? {}, initial());
  form?.refresh();
  keep();
});
$("copy-curl").addEventListener("click", () => copy($("curl").textContent, $("copy-curl")));
$("stop").addEventListener("click", stop);
$("new-chat").addEventListener("click", newChat);
$("theme").addEventListener("click", toggleTheme);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) stop();
});
addEventListener("pagehide", () => {
  // The browser ends the request with the page: that is no failure of the service.
  leaving = true;
  save();
});
addEventListener("pageshow", (event) => {
  if (event.persisted) location.reload();
});

$("suggestions").replaceChildren(
  ...SUGGESTIONS.map((text) => {
    const choose = () => {
      setDraft(text);
      send();
      message.focus();
    };
    return el("li", {}, el("button", { type: "button", class: "suggestion", onclick: choose }, text));
  }),
);
for (const name of ["system", "schema", "tools"]) $(name).value = state[name];
$("key").value = apiKey.get();
$("welcome").hidden = state.exchanges.length > 0;
setDraft(state.draft);
conversation.show(state.exchanges);
keep();
watch();
