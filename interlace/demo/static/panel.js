// One picture, large: its attributes, what resembles it, and questions about it.

import * as api from "./api.js";
import { CROSS, at, el, icon, percent, plural, show, title, valueOf } from "./dom.js";
import { card } from "./results.js";
import { go, pictures, read } from "./state.js";

const panel = () => at("panel");
let open = null; // key of what is shown
let waiting = null; // AbortController of its requests
let opener = null; // where the focus returns

export function close() {
  open = null;
  waiting?.abort();
  if (panel().open) panel().close();
}

/** Leaves the panel by the way it was entered, so that "back" does not open it again. */
export function leave() {
  if (history.state === "panel") history.back();
  else {
    go({ item: null, ask: null }, { replace: true });
    dispatchEvent(new Event("moved"));
  }
}

function bars(result) {
  const strongest = result.answers[0]?.probability || 1;
  const rows = result.answers.slice(0, 6);
  const rest = result.rest + result.answers.slice(6).reduce((sum, a) => sum + a.probability, 0);
  const row = (text, probability, kind) => {
    const fill = el("span", { class: "fill" });
    fill.style.width = `${Math.max(1, (100 * probability) / Math.max(strongest, rest))}%`;
    return el("li", { class: kind }, el("span", { class: "answer" }, text), el("span", { class: "track", "aria-hidden": "true" }, fill), el("span", { class: "chance" }, percent(probability)));
  };
  const others = result.n_answers - rows.length;
  return el("ol", { class: "bars", "aria-label": "Answers and their probabilities" }, ...rows.map((a, i) => row(a.answer, a.probability, i ? "" : "best")),
    others > 0 ? row(plural(others, "other answer", "other answers"), rest, "rest") : null);
}

function asking(info, subject) {
  if (!info.can_answer) return null;
  const input = el("input", { type: "text", class: "field", id: "question", maxlength: info.limits.max_text, placeholder: info.questions[0] ?? "What is this?", "aria-label": "Your question" });
  const reply = el("div", { class: "reply", "aria-live": "polite" });
  let running = null;
  const ask = async (question) => {
    if (!question.trim()) { reply.replaceChildren(el("p", { class: "wrong" }, "Write a question first.")); return; }
    running?.abort();
    running = new AbortController();
    reply.replaceChildren(el("p", { class: "note thinking" }, "Looking at the picture"));
    try {
      const result = await api.answer({ ...subject, question }, running.signal);
      reply.replaceChildren(el("p", { class: "said" }, el("span", { class: "note" }, result.question), el("strong", {}, result.answers[0]?.answer ?? "no answer")), bars(result));
    } catch (error) {
      if (error.name !== "AbortError") reply.replaceChildren(el("p", { class: "wrong" }, error.message));
    }
  };
  const form = el("form", { class: "ask", novalidate: true, onsubmit: (event) => { event.preventDefault(); ask(input.value || info.questions[0] || ""); } },
    input, el("button", { type: "submit", class: "go small" }, "Ask"));
  const tries = info.questions.slice(0, 6).map((question) =>
    el("li", {}, el("button", { type: "button", class: "chip", onclick: () => { input.value = question; ask(question); } }, question)));
  return el("section", { class: "asking", "aria-labelledby": "ask-title" }, el("h3", { id: "ask-title" }, "Ask about it"),
    form, tries.length ? el("ul", { class: "chips", "aria-label": "Suggested questions" }, ...tries) : null, reply);
}

function frame(heading, picture, alt, facts, below = []) {
  const image = el("img", { src: picture, alt, onerror: () => image.replaceWith(el("span", { class: "broken" }, "This browser or the demo cannot show the picture.")) });
  at("panel-inner").replaceChildren(
    el("button", { type: "button", class: "close", "aria-label": "Close", onclick: leave }, icon(CROSS)),
    el("div", { class: "left" }, el("div", { class: "stage" }, image), ...below.filter(Boolean)),
    el("div", { class: "facts" }, el("h2", { id: "panel-name", tabindex: "-1" }, heading), ...facts.filter(Boolean)));
}

function present() {
  if (panel().open) { panel().scrollTop = 0; return; }
  opener = document.activeElement;
  panel().showModal();
  at("panel-name")?.focus();
}

async function showItem(info, id, signal) {
  frame("Loading", api.address(id, "picture"), "", []);
  present();
  let item;
  try {
    item = await api.item(id, signal);
  } catch (error) {
    if (error.name === "AbortError") return;
    at("panel-inner").replaceChildren(
      el("button", { type: "button", class: "close", "aria-label": "Close", onclick: leave }, icon(CROSS)),
      el("div", { class: "facts alone" }, el("h2", { id: "panel-name", tabindex: "-1" }, "Not found"), el("p", {}, error.message)));
    return;
  }
  const list = el("dl", { class: "table" });
  for (const [column, value] of Object.entries(item.attributes)) {
    if (show(value) !== "–") list.append(el("div", {}, el("dt", {}, title(column)), el("dd", {}, valueOf(column, value))));
  }
  const row = el("ul", { class: "row" });
  const similar = el("section", { class: "similar", "aria-labelledby": "similar-title" },
    el("div", { class: "heading" }, el("h3", { id: "similar-title" }, "Similar ones"),
      el("button", { type: "button", class: "quiet", onclick: () => {
        go({ like: id, q: null, pic: null, item: null, ask: null, k: null });
        dispatchEvent(new Event("moved"));
      } }, "Search with this picture")), row);
  frame(item.name || item.id, api.address(id, "picture"), item.caption || item.name,
    [item.caption && item.caption !== item.name ? el("p", { class: "caption" }, item.caption) : null, asking(info, { item: id }), similar],
    [list.children.length ? list : null, el("p", { class: "id" }, el("span", { class: "note" }, "id "), el("code", {}, item.id))]);
  at("panel-name").focus();
  try {
    const { hits } = await api.search({ like: id, k: 8 }, signal);
    row.replaceChildren(...hits.map((hit) => card(hit, { compact: true })));
    if (!hits.length) row.replaceChildren(el("li", { class: "note" }, "Nothing else is in the index."));
  } catch (error) {
    if (error.name !== "AbortError") row.replaceChildren(el("li", { class: "wrong" }, error.message));
  }
}

/** Opens, changes or closes the panel as the address says. */
export function follow(info) {
  const state = read();
  const key = state.item ? `item ${state.item}` : state.ask && pictures.has(state.pic) ? `picture ${state.pic}` : null;
  if (key === open) return;
  waiting?.abort();
  waiting = new AbortController();
  open = key;
  if (!key) return close();
  if (state.item) return showItem(info, state.item, waiting.signal);
  const { file, url } = pictures.get(state.pic);
  frame("Your picture", url, "The picture you chose", [el("p", { class: "caption" }, file.name || "pasted picture"),
    asking(info, { picture: file }) ?? el("p", { class: "note" }, "This run was trained without questions, so it cannot answer any.")]);
  present();
}

export function wire() {
  panel().addEventListener("cancel", (event) => { event.preventDefault(); leave(); });
  panel().addEventListener("click", (event) => { if (event.target === panel()) leave(); });
  panel().addEventListener("close", () => {
    const again = opener?.isConnected ? opener : document.querySelector(`a.card[data-id="${CSS.escape(opener?.dataset?.id ?? "")}"]`);
    (again ?? at("words")).focus({ preventScroll: true });
    at("panel-inner").replaceChildren();
  });
}
