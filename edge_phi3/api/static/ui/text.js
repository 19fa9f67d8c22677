// An answer as nodes: exactly its text, with fenced code set apart.

import { el } from "./dom.js";

const FENCED = /^```([^\n`]*)\n([\s\S]*?)(?:\n?^```[ \t]*$\n?|(?![\s\S]))/gm;

/** Show `text` in `container`, touching as little as possible while it grows. */
export function showText(container, text) {
  const only = container.firstChild;
  if (!text.includes("```")) {
    if (only?.nodeType === Node.TEXT_NODE && container.childNodes.length === 1 && text.startsWith(only.data)) {
      only.appendData(text.slice(only.data.length));
    } else {
      container.replaceChildren(text);
    }
    return;
  }
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(FENCED)) {
    if (match.index > end) nodes.push(text.slice(end, match.index).replace(/\n$/, ""));
    nodes.push(el("pre", { tabindex: "0", "data-language": match[1].trim() || null }, el("code", {}, match[2])));
    end = match.index + match[0].length;
  }
  if (end < text.length) nodes.push(text.slice(end).replace(/^\n/, ""));
  container.replaceChildren(...nodes);
}
