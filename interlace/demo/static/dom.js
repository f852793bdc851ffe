// Small helpers. Everything a person or a model wrote reaches the page as text, never as markup.

/** The element with this id. */
export const at = (id) => document.getElementById(id);

/** el("p", {class: "name", onclick: f, hidden: true}, "text", child): strings become text nodes. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const SVG = "http://www.w3.org/2000/svg";

/** A line icon of 24 x 24 from path data. */
export function icon(...paths) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  for (const d of paths) {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("d", d);
    svg.append(path);
  }
  return svg;
}

export const CROSS = "m7 7 10 10M17 7 7 17";

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const four = new Intl.NumberFormat("en", { maximumSignificantDigits: 4, useGrouping: false });

export const count = (n) => whole.format(n);
export const plural = (n, one, many) => `${count(n)} ${n === 1 ? one : many}`;
export const percent = (p) => (p > 0 && p < 0.01 ? "< 1 %" : p < 1 && p > 0.99 ? "> 99 %" : `${Math.round(p * 100)} %`);
export const number = (x) => (Number.isInteger(x) ? String(x) : four.format(x));

/** An attribute's value as people write it. */
export function show(value) {
  if (value === null || value === undefined || value === "") return "–";
  if (value === true) return "yes";
  if (value === false) return "no";
  return typeof value === "number" ? number(value) : String(value);
}

// Units people put at the end of a column's name, as they are written: width_cm, energy_kj.
const UNITS = Object.fromEntries(["mm", "cm", "m", "km", "mg", "g", "kg", "ml", "l", "kJ", "kcal", "W", "kW", "ms", "s", "min", "h", "px", "EUR", "USD", "GBP"]
  .map((unit) => [unit.toLowerCase(), unit]));

/** "seat_height_cm" -> {label: "Seat height", unit: "cm"}. */
function parts(column) {
  const words = column.replaceAll("_", " ").trim().split(/\s+/);
  const unit = words.length > 1 ? UNITS[words.at(-1).toLowerCase()] ?? "" : "";
  const text = (unit ? words.slice(0, -1) : words).join(" ");
  return { label: text.charAt(0).toUpperCase() + text.slice(1), unit };
}

/** "seat_height_cm" -> "Seat height". */
export const title = (column) => parts(column).label;

/** A value with its column's unit: "48.3 cm". */
export function valueOf(column, value) {
  const { unit } = parts(column);
  return typeof value === "number" && unit ? `${number(value)} ${unit}` : show(value);
}
