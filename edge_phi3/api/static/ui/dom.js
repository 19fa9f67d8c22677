// Small helpers over the DOM. Strings become text nodes and attributes, never HTML.

/** Make an element; attributes that are null or false are left out, those that begin with "on" are listeners. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Make one of the icons that index.html holds. */
export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(space, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** Turn a sentence with `words in backticks` into nodes. */
export function withCode(sentence) {
  return sentence.split("`").map((part, index) => (index % 2 ? el("code", {}, part) : part));
}

/** Copy a text, and say so on the button that was pressed. */
export async function copy(text, button) {
  const label = button.querySelector(".label");
  const before = label.textContent;
  try {
    await navigator.clipboard.writeText(text);
    label.textContent = "Copied";
  } catch {
    label.textContent = copyWithSelection(text) ? "Copied" : "Not allowed";
  }
  setTimeout(() => (label.textContent = before), 1600);
}

// Pages over plain HTTP have no clipboard interface.
function copyWithSelection(text) {
  const area = el("textarea", { class: "visually-hidden", "aria-hidden": "true", tabindex: "-1" });
  area.value = text;
  const focused = document.activeElement;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return done;
}
