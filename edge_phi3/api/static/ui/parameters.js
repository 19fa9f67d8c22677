// The form of the generation parameters, made from their JSON schemas: nothing about them is written here.

import { el, icon, withCode } from "./dom.js";

/**
 * Give a value's JSON source for what was typed. What does not fit is sent as it is: the service's own sentence says
 * what is allowed.
 * @returns {string|null} null where nothing was typed
 */
export function sourceOf(schema, typed) {
  const text = typed.trim();
  if (text === "") return null;
  if (text === "null") return text;
  if (typesOf(schema).some((type) => type === "integer" || type === "number")) {
    if (/^-?\d+$/.test(text)) return String(BigInt(text));
    const number = Number(text);
    if (Number.isFinite(number)) return JSON.stringify(number);
  }
  if (/^(true|false|["[{].*)$/s.test(text) && isJSON(text)) return text;
  return JSON.stringify(typed);
}

/** Give what to show in a field for a value's JSON source. */
export function typedOf(source) {
  const value = JSON.parse(source);
  const isPlain = typeof value === "string" && sourceOf({ type: "string" }, value) === source && !value.includes("\n");
  return isPlain ? value : source;
}

/** Say in words which values a schema allows. */
export function rangeOf(schema) {
  const { minimum, maximum, exclusiveMinimum: above, exclusiveMaximum: below } = schema;
  const words = [];
  if (minimum !== undefined && maximum !== undefined) words.push(`${number(minimum)} to ${number(maximum)}`);
  else if (minimum !== undefined) words.push(`${number(minimum)} or more`);
  else if (above !== undefined) words.push(`above ${number(above)}`);
  if (maximum !== undefined && minimum === undefined) words.push(`at most ${number(maximum)}`);
  if (below !== undefined) words.push(`below ${number(below)}`);
  return words.join(", ");
}

function number(value) {
  return Number.isSafeInteger(value) || value < 2 ** 53 ? String(value) : `2^${Math.round(Math.log2(value))} − 1`;
}

function typesOf(schema) {
  return schema.anyOf ? schema.anyOf.flatMap(typesOf) : [schema.type];
}

// A long name may go on in the next line after an underscore.
function breakable(name) {
  return name.split(/(?<=_)/).flatMap((part, index) => (index ? [el("wbr"), part] : [part]));
}

function isJSON(text) {
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}

/** The form. */
export class ParameterForm {
  /**
   * @param {HTMLElement} root
   * @param {{groups: {title: string, parameters: string[]}[], parameters: Record<string, object>}} config
   * @param {Record<string, string>} values name to JSON source; changed as the form is
   * @param {() => void} onChange
   */
  constructor(root, config, values, onChange) {
    this.values = values;
    this.onChange = onChange;
    this.fields = [];
    root.replaceChildren(...config.groups.map((group, index) => this.#group(group, config.parameters, index === 0)));
    this.refresh();
  }

  /** Show the values anew. */
  refresh() {
    for (const field of this.fields) field.refresh();
  }

  /** Show only parameters whose name or meaning holds `words`; all of them when it is empty. */
  filter(words) {
    const wanted = words.trim().toLowerCase();
    for (const field of this.fields) field.row.hidden = !field.searched.includes(wanted);
    for (const group of new Set(this.fields.map((field) => field.group))) {
      group.hidden = this.fields.every((field) => field.group !== group || field.row.hidden);
      group.open = wanted ? true : group.dataset.first === "true";
    }
  }

  #group({ title, parameters }, schemas, first) {
    const attributes = { class: "group", open: first, "data-first": String(first) };
    const details = el("details", attributes, el("summary", {}, title));
    for (const name of parameters) {
      const field = new Field(name, schemas[name], this.values, this.onChange);
      field.group = details;
      this.fields.push(field);
      details.append(field.row);
    }
    return details;
  }
}

class Field {
  constructor(name, described, values, onChange) {
    this.name = name;
    this.values = values;
    this.onChange = onChange;
    [this.schema] = described.anyOf;
    this.searched = `${name} ${described.description}`.toLowerCase();
    const isDefault = "default" in described ? `default ${JSON.stringify(described.default)}` : "not set by default";
    const id = `parameter-${name}`;
    this.control = this.#control(id, described);
    this.control.setAttribute("aria-describedby", `${id}-meaning`);
    const set = (typed) => this.#set(sourceOf(this.schema, typed));
    this.control.addEventListener("input", () => set(this.control.value));
    const { minimum, maximum, type } = this.schema;
    if (type === "number" && minimum !== undefined && maximum !== undefined) {
      const attributes = { type: "range", min: minimum, max: maximum, step: "any" };
      this.slider = el("input", { ...attributes, "aria-label": `${name}, slider` });
      this.sliderStart = described.default ?? minimum;
      this.slider.addEventListener("input", () => {
        this.control.value = String(Math.round(this.slider.value * 100) / 100);
        set(this.control.value);
      });
    }
    this.reset = el("button", { type: "button", class: "reset", title: "Back to the default" }, icon("reset"));
    this.reset.append(el("span", { class: "visually-hidden" }, `Reset ${name}`));
    this.reset.addEventListener("click", () => {
      this.#set(null);
      this.refresh();
      this.control.focus();
    });
    const meaning = el("p", { class: "meaning", id: `${id}-meaning` }, ...withCode(described.description));
    meaning.append(el("span", { class: "range" }, [rangeOf(this.schema), isDefault].filter(Boolean).join(" · ")));
    this.row = el(
      "div",
      { class: "parameter" },
      el("label", { for: id }, ...breakable(name)),
      this.reset,
      this.control,
      this.slider,
      meaning,
    );
  }

  #control(id, described) {
    const choices = this.schema.enum ?? (this.schema.type === "boolean" ? [true, false] : null);
    if (choices === null) {
      const wide = typesOf(this.schema).some((type) => type === "array" || type === "string");
      const example = `e.g. ${JSON.stringify(described.examples[0])}`;
      const placeholder = wide ? example : (JSON.stringify(described.default) ?? "not set");
      const inputmode = wide ? "text" : "decimal";
      const attributes = { id, name: this.name, type: "text", inputmode, placeholder, class: wide ? "wide" : null };
      return el("input", { ...attributes, autocomplete: "off", autocapitalize: "off", spellcheck: "false" });
    }
    const start = "default" in described ? "default" : "not set";
    const options = choices.map((choice) => el("option", { value: JSON.stringify(choice) }, String(choice)));
    return el("select", { id, name: this.name }, el("option", { value: "" }, start), ...options);
  }

  refresh() {
    const source = this.values[this.name];
    if (source === undefined) this.control.value = "";
    else this.control.value = this.control.tagName === "SELECT" ? source : typedOf(source);
    this.#mark();
  }

  #set(source) {
    if (source === null) delete this.values[this.name];
    else this.values[this.name] = source;
    this.#mark();
    this.onChange();
  }

  #mark() {
    const source = this.values[this.name];
    this.row.classList.toggle("changed", source !== undefined);
    this.reset.hidden = source === undefined;
    if (this.slider) this.slider.value = Number(source ?? this.sliderStart);
  }
}
