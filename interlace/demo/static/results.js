// The grid: cards, skeletons while waiting, and the arrow keys.

import * as api from "./api.js";
import { at, el, percent, plural } from "./dom.js";
import { brief } from "./filters.js";
import { link, read } from "./state.js";

const SCORE = "Similarity of the query and this picture. 1 would be identical; compare scores within one search only.";
const MATCH = "Probability, by the model, that the words and this picture belong together. The order follows it.";

export function card(hit, { compact = false } = {}) {
  const name = el("span", { class: "name" }, hit.name || hit.id);
  const figures = el("span", { class: "figures" });
  if (hit.match !== null && hit.match !== undefined) {
    figures.append(el("span", { class: "match", title: MATCH }, el("span", { class: "sr" }, "match "), percent(hit.match)));
  }
  if (hit.score !== undefined) {
    figures.append(el("span", { class: "score", title: SCORE }, el("span", { class: "sr" }, "score "), hit.score.toFixed(2)));
  }
  const picture = el("img", {
    src: api.address(hit.id, "thumbnail"), alt: hit.caption || hit.name, loading: "lazy", decoding: "async",
    onerror: () => picture.replaceWith(el("span", { class: "broken" }, "picture missing")),
  });
  return el("li", {}, el("a", { class: compact ? "card compact" : "card", href: link({ ...read(), item: hit.id, ask: null }), "data-id": hit.id },
    el("span", { class: "tile" }, picture),
    name, compact ? null : figures,
    compact ? null : el("span", { class: "attributes" }, ...brief(hit.attributes).map(([column, text], i, all) => el("span", { title: column }, i < all.length - 1 ? `${text} · ` : text)))));
}

export function skeletons(n) {
  at("grid").setAttribute("aria-busy", "true");
  at("grid").replaceChildren(...Array.from({ length: n }, () =>
    el("li", { class: "skeleton", "aria-hidden": "true" }, el("span", { class: "tile" }), el("span", { class: "bone" }), el("span", { class: "bone short" }))));
}

export function show(hits) {
  at("grid").removeAttribute("aria-busy");
  at("grid").replaceChildren(...hits.map((hit) => card(hit)));
}

export const found = (hits, total, milliseconds, reranked) =>
  `${plural(hits, "picture", "pictures")} of ${total} in ${milliseconds < 10 ? milliseconds.toFixed(1) : Math.round(milliseconds)} ms` + (reranked ? ", re-ranked" : "");

/** Left and right walk, up and down keep the column, whatever the number of columns is now. */
export function arrows(event) {
  const cards = [...at("grid").querySelectorAll("a.card")];
  const here = cards.indexOf(document.activeElement);
  if (here < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
  const top = (i) => cards[i].getBoundingClientRect().top;
  let columns = 1;
  while (columns < cards.length && Math.abs(top(columns) - top(0)) < 4) columns++;
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -here, End: cards.length - 1 - here };
  if (!(event.key in steps)) return;
  event.preventDefault();
  const there = here + steps[event.key];
  if (there < 0 && event.key === "ArrowUp") at("words").focus();
  else if (there >= 0) cards[Math.min(there, cards.length - 1)].focus();
}
