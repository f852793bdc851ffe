// A pill per column, each opening a small sheet: values to tick, a range to type, or yes and no.

import { CROSS, at, count, el, icon, number, show, title, valueOf } from "./dom.js";
import { go, read } from "./state.js";

const SHOWN = 8; // pills before "More filters"
let columns = [];
let rows = 0; // looked at for the values below, by the server: see facets.py
let exact = true; // counts of all rows, not of a sample

const KEYWORDS = ["and", "or", "not", "in", "is", "contains", "missing"];
const quoted = (text) => `'${String(text).replaceAll("'", "''")}'`;
const column = (name) => (/^\w+$/.test(name) && !KEYWORDS.includes(name.toLowerCase()) ? name : quoted(name));

/** The filter language's text for the chosen pills and the hand-written filter, or "". */
export function compose(state) {
  const parts = [];
  for (const [name, values] of state.filters) {
    const type = columns.find((c) => c.name === name)?.type;
    if (type === "number") {
      const [low, high] = (values[0] ?? "").split("..");
      if (low !== "" && isFinite(low)) parts.push(`${column(name)} >= ${Number(low)}`);
      if (high !== undefined && high !== "" && isFinite(high)) parts.push(`${column(name)} <= ${Number(high)}`);
    } else if (type === "boolean") {
      parts.push(`${column(name)} = ${values[0] === "true" ? "yes" : "no"}`);
    } else if (values.length === 1) {
      parts.push(`${column(name)} = ${quoted(values[0])}`);
    } else if (values.length > 1) {
      parts.push(`${column(name)} in (${values.map(quoted).join(", ")})`);
    }
  }
  if (state.where) parts.push(parts.length ? `(${state.where})` : state.where);
  return parts.join(" and ");
}

const words = (type, values) =>
  type === "number" ? values[0].replace(/^\.\./, "up to ").replace(/\.\.$/, " and more").replace("..", " to ")
  : type === "boolean" ? (values[0] === "true" ? "yes" : "no")
  : values.length > 2 ? `${values.length} values` : values.join(", ");

/** A column makes a useful pill when its values repeat or form a range. */
const useful = (c) =>
  c.type === "number" ? c.maximum > c.minimum
  : c.type === "boolean" ? c.values.length > 0
  : c.distinct > 1 && c.distinct <= rows / 4;

function change(name, values) {
  const filters = new Map(read().filters);
  if (values.length) filters.set(name, values);
  else filters.delete(name);
  go({ filters, k: null });
  dispatchEvent(new Event("moved"));
}

function ticks(c, chosen) {
  const list = el("ul", { class: "ticks" });
  // a value from the address may not be among the frequent ones
  const values = [...chosen.filter((v) => !c.values.some((known) => known.value === v)).map((value) => ({ value })), ...c.values];
  for (const { value, count: n } of values) {
    const box = el("input", {
      type: "checkbox", value, checked: chosen.includes(value),
      onchange: () => change(c.name, [...list.querySelectorAll("input:checked")].map((i) => i.value)),
    });
    list.append(el("li", {}, el("label", {}, box, el("span", {}, value), n && exact ? el("small", {}, count(n)) : null)));
  }
  if (c.values.length <= 10) return [list];
  const narrow = el("input", {
    type: "text", class: "field", placeholder: "Find a value", "aria-label": `Find a value of ${title(c.name)}`,
    oninput: () => {
      for (const li of list.children) li.hidden = !li.textContent.toLowerCase().includes(narrow.value.toLowerCase());
    },
  });
  return [narrow, list, c.distinct > c.values.length ? el("p", { class: "note" }, `The ${c.values.length} most frequent values.`) : null];
}

function range(c, chosen) {
  const [low = "", high = ""] = (chosen[0] ?? "").split("..");
  const apply = () => {
    const text = `${from.value}..${to.value}`;
    change(c.name, text === ".." ? [] : [text]);
  };
  const side = (label, value, hint) => el("input", {
    type: "number", class: "field", step: "any", value, placeholder: number(hint), "aria-label": `${title(c.name)} ${label}`, onchange: apply,
  });
  const from = side("at least", low, c.minimum);
  const to = side("at most", high, c.maximum);
  return [el("div", { class: "range" }, el("label", {}, "at least", from), el("label", {}, "at most", to)),
    el("p", { class: "note" }, `${valueOf(c.name, c.minimum)} to ${valueOf(c.name, c.maximum)}`)];
}

function yesNo(c, chosen) {
  const options = [["any", ""], ["yes", "true"], ["no", "false"]];
  return [el("div", { class: "radios", role: "radiogroup", "aria-label": title(c.name) }, ...options.map(([label, value]) =>
    el("label", {}, el("input", {
      type: "radio", name: `f-${c.name}`, value, checked: (chosen[0] ?? "") === value, onchange: () => change(c.name, value ? [value] : []),
    }), label)))];
}

function fill(sheet, c) {
  const chosen = read().filters.get(c.name) ?? [];
  const body = c.type === "number" ? range(c, chosen) : c.type === "boolean" ? yesNo(c, chosen) : ticks(c, chosen);
  sheet.replaceChildren(el("p", { class: "sheet-title" }, title(c.name)), ...body.filter(Boolean),
    chosen.length ? el("button", { type: "button", class: "quiet", onclick: () => { change(c.name, []); fill(sheet, c); } }, "Clear") : "");
}

export function pill(label, id, fillSheet) {
  const sheet = el("div", { class: "sheetlet" });
  // filled at the click, not at the later "toggle" event, which would replace what was typed in between
  const summary = el("summary", { onclick: () => details.open || fillSheet(sheet) }, el("span", {}, label));
  const details = el("details", { class: "pop", id }, summary, sheet);
  return details;
}

/** Builds the row of pills once; `mark` keeps it up to date. */
export function build(info, options) {
  columns = info.columns;
  exact = info.exact_counts;
  rows = Math.min(info.count, 20000);
  const shown = columns.filter(useful);
  const row = at("filters");
  row.replaceChildren();
  shown.forEach((c, i) => {
    const details = pill(title(c.name), null, (sheet) => fill(sheet, c));
    details.dataset.column = c.name;
    details.hidden = shown.length > SHOWN + 1 && i >= SHOWN; // one more pill is no longer than a button saying so
    row.append(details);
  });
  if (shown.length > SHOWN + 1) {
    const more = el("button", {
      type: "button", class: "quiet", "aria-expanded": "false", onclick: () => {
        const open = more.getAttribute("aria-expanded") !== "true";
        more.setAttribute("aria-expanded", open);
        more.textContent = open ? "Fewer filters" : `${shown.length - SHOWN} more filters`;
        [...row.querySelectorAll("details[data-column]")].forEach((d, i) => { d.hidden = !open && i >= SHOWN && !d.classList.contains("on"); });
      },
    }, `${shown.length - SHOWN} more filters`);
    row.append(more);
  }
  row.append(options);
}

/** Shows which filters are on: in the pills and as removable tokens above the results. */
export function mark() {
  const state = read();
  for (const details of at("filters").querySelectorAll("details[data-column]")) {
    const on = state.filters.has(details.dataset.column);
    details.classList.toggle("on", on);
    if (on) details.hidden = false;
  }
  const token = (text, remove) => el("button", { type: "button", class: "token", "aria-label": `Remove the filter ${text}`, onclick: remove }, text, icon(CROSS));
  const tokens = [...state.filters].map(([name, values]) =>
    token(`${title(name)}: ${words(columns.find((c) => c.name === name)?.type, values)}`, () => change(name, [])));
  if (state.where) tokens.push(token(state.where, () => { go({ where: null }); dispatchEvent(new Event("moved")); }));
  if (tokens.length > 1) {
    tokens.push(el("button", { type: "button", class: "quiet", onclick: () => { go({ filters: new Map(), where: null }); dispatchEvent(new Event("moved")); } }, "Clear all"));
  }
  at("chosen").replaceChildren(...tokens);
}

/** The two or three attributes worth a line on a card: what kind of thing it is, then how large, dear or old. */
export function brief(attributes) {
  const known = columns.filter((c) => show(attributes[c.name]) !== "–");
  const texts = known.filter((c) => c.type === "text" && useful(c)).sort((a, b) => (a.distinct < 4) - (b.distinct < 4)); // two or three values say little
  const numbers = known.filter((c) => c.type === "number" && useful(c));
  return [...texts.slice(0, 1), ...numbers.slice(0, 2), ...texts.slice(1)].slice(0, 3).map((c) => [title(c.name), c.type === "number" ? `${title(c.name).toLowerCase()} ${valueOf(c.name, attributes[c.name])}` : show(attributes[c.name])]);
}
