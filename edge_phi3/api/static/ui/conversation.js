// The conversation on the page: one article for each exchange.

import { wordsOf } from "./answer.js";
import { copy, el, icon } from "./dom.js";
import { showText } from "./text.js";

/** Shows exchanges, and keeps the newest text in sight for those who look at the end. */
export class Conversation {
  /**
   * @param {HTMLElement} root
   * @param {{again: (exchange: object) => void}} actions
   */
  constructor(root, actions) {
    this.root = root;
    this.actions = actions;
    this.views = new Map();
  }

  /** Show exactly these exchanges. */
  show(exchanges) {
    this.views.clear();
    this.root.replaceChildren();
    for (const exchange of exchanges) this.add(exchange);
  }

  /** Show one more exchange. */
  add(exchange) {
    const view = new View(exchange, this.actions);
    this.views.set(exchange, view);
    this.root.append(view.node);
    this.update(exchange);
    this.scrollToEnd();
  }

  /** Show what has changed in an exchange. */
  update(exchange) {
    const scroller = document.scrollingElement;
    const follows = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
    this.views.get(exchange)?.update();
    if (follows) this.scrollToEnd();
  }

  scrollToEnd() {
    const scroller = document.scrollingElement;
    scroller.scrollTop = scroller.scrollHeight;
  }
}

class View {
  constructor(exchange, actions) {
    this.exchange = exchange;
    this.texts = [];
    this.answer = el("div", { class: "answer", "aria-live": "polite" });
    this.error = el("p", { class: "error", role: "alert", hidden: true });
    this.facts = el("ul", { class: "facts", "aria-label": "About this answer" });
    this.copyButton = action("copy", "Copy", () => copy(exchange.answers.join("\n\n"), this.copyButton));
    this.againButton = action("again", "Try again", () => actions.again(exchange));
    this.foot = el("footer", {}, this.facts, el("div", { class: "actions" }, this.copyButton, this.againButton));
    this.node = el(
      "article",
      { class: "exchange" },
      el("h2", { class: "visually-hidden" }, "You asked"),
      el("p", { class: "question" }, exchange.user),
      el("h2", { class: "visually-hidden" }, "The answer"),
      this.answer,
      this.error,
      this.foot,
    );
  }

  update() {
    const { answers, status, error, facts } = this.exchange;
    this.node.dataset.status = status;
    this.answer.setAttribute("aria-busy", String(status === "running"));
    while (this.texts.length < answers.length) this.addText();
    this.answer.classList.toggle("several", answers.length > 1);
    answers.forEach((answer, index) => showText(this.texts[index], answer.trimStart()));
    this.error.hidden = error === null;
    if (this.error.textContent !== (error ?? "")) this.error.textContent = error ?? "";
    this.foot.hidden = status === "running";
    this.copyButton.hidden = !answers.some(Boolean);
    const words = facts === null ? [] : wordsOf(facts);
    if (status === "stopped") words.push(["reason", "stopped"]);
    this.facts.replaceChildren(...words.map(([kind, text, title]) => el("li", { "data-fact": kind, title }, text)));
  }

  addText() {
    const text = el("div", { class: "text" });
    this.texts.push(text);
    this.answer.append(text);
  }
}

function action(name, label, onclick) {
  const words = el("span", { class: "label" }, label);
  return el("button", { type: "button", class: `quiet ${name}`, onclick }, icon(name), words);
}
