// Starts the page and keeps it in step with the address: every change goes through the address, then `render`.

import * as api from "./api.js";
import { at, count, el, number, title } from "./dom.js";
import * as filters from "./filters.js";
import * as panel from "./panel.js";
import * as results from "./results.js";
import { go, keep, pictures, read } from "./state.js";

const STEP = 24; // pictures per search and per "show more"
let info = null;
let shown = null; // the request whose results are on the page
let waiting = null;

const MODES = [["vector", "By meaning", "Compares what the words and pictures mean."],
  ["text", "By words in the caption", "Only pictures whose caption contains the words."],
  ["hybrid", "Both", "Merges the two orders."]];

function alertWith(message, action = null) {
  if (!message) return at("alert").replaceChildren();
  const [sentence, ...place] = message.split("\n"); // a wrong filter comes with its place marked on the lines below
  at("alert").replaceChildren(el("p", {}, sentence, place.length ? el("pre", { tabindex: "0" }, place.map((l) => l.replace(/^ {2}/, "")).join("\n")) : null), ...(action ? [action] : []));
}

function hintWith(text) {
  at("hint").hidden = !text;
  at("hint").textContent = text ?? "";
}

// ---- searching -------------------------------------------------------------------------------------------------

function request(state) {
  const where = filters.compose(state);
  if (!state.q && !state.like && !state.pic) return { where };
  const both = state.q && (state.pic || state.like);
  return { text: state.q, like: state.pic ? null : state.like, pic: state.pic, where, k: state.k ?? STEP, mode: state.q ? state.mode : null,
    rerank: state.q ? state.rerank : null, weight: both && state.w ? Number(state.w) / 100 : null };
}

async function run(state, again) {
  const wanted = request(state);
  const key = JSON.stringify(wanted);
  if (key === shown && !again) return;
  shown = key;
  waiting?.abort();
  const mine = (waiting = new AbortController());
  alertWith(null);
  hintWith(null);
  at("more").hidden = true;
  at("legend").hidden = true;
  document.body.classList.add("busy");
  const more = Number(state.k ?? STEP) > at("grid").querySelectorAll("a.card").length && Number(state.k ?? STEP) > STEP;
  if (!more) results.skeletons(12); // "show more" keeps what is there
  try {
    const searching = wanted.text || wanted.like || wanted.pic;
    if (wanted.pic && !pictures.has(wanted.pic)) {
      throw new api.Failed("The picture of this search was only held in memory, and the page has been reloaded since. Choose it again.", 0);
    }
    const { pic, ...fields } = wanted;
    if (searching) {
      at("status").textContent = "Searching";
      const reply = await api.search({ ...fields, picture: pic ? pictures.get(pic).file : null }, mine.signal);
      results.show(reply.hits);
      at("status").textContent = results.found(reply.hits.length, count(reply.count), reply.milliseconds, reply.reranked);
      hintWith(reply.hint);
      at("legend").hidden = !reply.reranked;
      at("more").hidden = reply.hits.length < Number(fields.k) || Number(fields.k) >= info.limits.max_k;
    } else {
      const reply = await api.browse(STEP, wanted.where, mine.signal);
      results.show(reply.items);
      at("status").textContent = !reply.count ? "The index is empty. Fill it with: interlace index"
        : wanted.where ? `${count(reply.items.length)}${reply.items.length === STEP ? " of the" : ""} pictures that pass the filter`
        : `A few of the ${count(reply.count)} pictures`;
      if (wanted.where && !reply.items.length) hintWith("No picture passes this filter. Loosen it or remove it.");
    }
  } catch (error) {
    if (error.name === "AbortError") return;
    results.show([]);
    at("status").textContent = "";
    alertWith(error.message, error.status === 0 && !wanted.pic ? el("button", { type: "button", class: "quiet", onclick: () => render(true) }, "Try again") : null);
  } finally {
    if (waiting === mine) document.body.classList.remove("busy");
  }
}

/** The form shows what the address says. */
function fillForm(state) {
  if (document.activeElement !== at("words") || state.q !== undefined) at("words").value = state.q ?? "";
  const picture = state.pic && pictures.get(state.pic);
  const source = picture ? picture.url : state.like ? api.address(state.like, "thumbnail") : null;
  at("given").hidden = !source;
  if (source && at("given-picture").getAttribute("src") !== source) at("given-picture").src = source;
  const both = Boolean(source && state.q);
  at("balance").hidden = !both;
  at("weight").value = state.w ?? 50;
  describeWeight();
  at("box").classList.toggle("has-words", Boolean(state.q));
  at("box").classList.toggle("has-picture", Boolean(source));
  document.body.classList.toggle("searched", Boolean(state.q || source));
  document.title = state.q ? `${state.q} · interlace` : "interlace";
}

export function render(again = false) {
  if (!info) return;
  const state = read();
  fillForm(state);
  filters.mark();
  run(state, again === true);
  panel.follow(info);
}

function move(changes, options) {
  const state = read();
  if (go(changes, options)) render();
  else if (JSON.stringify(request(state)) === shown) render(true); // the same question again: ask again
}

function submit(event) {
  event?.preventDefault();
  const q = at("words").value.trim();
  const state = read();
  if (!q && !state.pic && !state.like) {
    move({ q: null, k: null });
    alertWith("Write what you are looking for, or add a picture: choose one, drop it on the page or paste it.");
    at("words").focus();
    return;
  }
  if (q.length > info.limits.max_text) { alertWith(`The words are too long: at most ${count(info.limits.max_text)} characters.`); return; }
  move({ q, k: null });
}

// ---- the picture to search with ----------------------------------------------------------------------------------

function take(file) {
  if (!file) return;
  if (file.type && !file.type.startsWith("image/")) {
    alertWith(`${file.name || "This"} is not a picture (${file.type}). Choose a JPEG, PNG, WebP or GIF.`);
    return;
  }
  if (file.size > info.limits.max_bytes) {
    alertWith(`${file.name || "The picture"} is ${(file.size / 1e6).toFixed(1)} MB; at most ${number(info.limits.max_bytes / 1e6)} MB can be sent. Choose a smaller one.`);
    return;
  }
  move({ pic: keep(file), like: null, item: null, ask: null, q: at("words").value.trim(), k: null });
}

function describeWeight() {
  const picture = Number(at("weight").value);
  at("weight").setAttribute("aria-valuetext", `${100 - picture} % words, ${picture} % picture`);
  at("weight").title = `${100 - picture} % words, ${picture} % picture`;
}

function dragAndPaste() {
  let depth = 0;
  const files = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  addEventListener("dragenter", (event) => { if (files(event)) { depth++; at("veil").hidden = false; } });
  addEventListener("dragleave", (event) => { if (files(event) && --depth <= 0) { depth = 0; at("veil").hidden = true; } });
  addEventListener("dragover", (event) => { if (files(event)) event.preventDefault(); });
  addEventListener("drop", (event) => {
    if (!files(event)) return;
    event.preventDefault();
    depth = 0;
    at("veil").hidden = true;
    take(event.dataTransfer.files[0]);
  });
  addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find((f) => f.type.startsWith("image/"));
    if (file) { event.preventDefault(); take(file); }
  });
}

// ---- what surrounds the search -----------------------------------------------------------------------------------

function optionsPill() {
  return filters.pill("Options", "options", (sheet) => {
    const state = read();
    const mode = state.mode ?? "vector";
    const modes = el("fieldset", {}, el("legend", {}, "Find"), ...MODES.map(([value, label, help]) => el("label", { class: "choice" },
      el("input", { type: "radio", name: "mode", value, checked: mode === value, onchange: () => move({ mode: value === "vector" ? null : value, k: null }) }),
      el("span", {}, label, el("small", {}, help)))));
    const rerank = info.can_match ? el("label", { class: "choice" },
      el("input", { type: "checkbox", id: "rerank", checked: state.rerank !== "false", onchange: (event) => move({ rerank: event.target.checked ? null : "false" }) }),
      el("span", {}, "Re-rank", el("small", {}, "The model looks at the words and each of the best pictures together. Slower, better order."))) : null;
    const expert = el("input", { type: "text", class: "field mono", id: "where", value: state.where ?? "", spellcheck: "false", autocapitalize: "off", placeholder: example(), "aria-describedby": "where-help" });
    const apply = () => { closeSheets(); document.querySelector("#options > summary").focus(); move({ where: expert.value.trim() || null, k: null }); };
    expert.addEventListener("keydown", (event) => { if (event.key === "Enter") { event.preventDefault(); apply(); } });
    sheet.replaceChildren(modes, rerank ?? "", el("div", { class: "expert" }, el("label", { for: "where" }, "Filter, written out"),
      el("div", { class: "ask" }, expert, el("button", { type: "button", class: "go small", onclick: apply }, "Apply")),
      el("p", { class: "note", id: "where-help" }, "Columns: ", info.columns.map((c) => c.name).join(", ") || "none")));
  });
}

function example() {
  const text = info.columns.find((c) => c.type === "text" && c.values.length);
  const figure = info.columns.find((c) => c.type === "number" && c.maximum > c.minimum);
  return [text && `${text.name} = '${text.values[0].value}'`, figure && `${figure.name} < ${number(Math.round((figure.minimum + figure.maximum) / 2))}`].filter(Boolean).join(" and ");
}

function aboutRun() {
  at("about-name").textContent = info.run;
  at("about-count").textContent = ` · ${count(info.count)} pictures`;
  const share = (x) => (100 * x).toFixed(1);
  const rows = info.metrics.slice(0, 14).map((m) => el("div", {}, el("dt", {}, m.name), el("dd", {}, `${share(m.value)} %`,
    m.chance !== null ? el("small", {}, ` chance ${share(m.chance)}`) : null)));
  const can = [info.can_match ? "re-rank by matching" : null, info.can_answer ? `answer questions (${count(info.n_answers)} answers)` : null].filter(Boolean);
  at("about-body").replaceChildren(el("p", { class: "sheet-title" }, info.run),
    el("p", { class: "note" }, `${count(info.count)} pictures, ${info.columns.length} columns. It can search${can.length ? ", " + can.join(", ") : ""}.`),
    rows.length ? el("dl", { class: "table" }, ...rows) : el("p", { class: "note" }, "The run has no evaluation yet."));
}

function examples() {
  at("examples").hidden = !info.examples.length;
  at("examples").querySelector("ul").replaceChildren(...info.examples.map((query) =>
    el("li", {}, el("button", { type: "button", class: "chip", onclick: () => move({ q: query, pic: null, like: null, k: null }) }, query))));
}

function closeSheets(except) {
  for (const open of document.querySelectorAll("details.pop[open]")) if (open !== except) open.open = false;
}

function wire() {
  at("search").addEventListener("submit", submit);
  at("pick").addEventListener("click", () => at("file").click());
  at("file").addEventListener("change", () => { take(at("file").files[0]); at("file").value = ""; });
  at("given-remove").addEventListener("click", () => { move({ pic: null, like: null, ask: null, w: null, k: null }); at("words").focus(); });
  at("given-open").addEventListener("click", () => {
    const state = read();
    go(state.pic ? { ask: "1" } : { item: state.like }, { mark: "panel" });
    render();
  });
  at("weight").addEventListener("input", describeWeight);
  at("weight").addEventListener("change", () => move({ w: at("weight").value === "50" ? null : at("weight").value }));
  at("more").addEventListener("click", () => {
    const k = Math.min(Number(read().k ?? STEP) + STEP, info.limits.max_k);
    move({ k }, { replace: true });
  });
  at("home").addEventListener("click", (event) => { event.preventDefault(); at("words").value = ""; history.pushState(null, "", location.pathname); render(); at("words").focus(); });
  at("skip").addEventListener("click", (event) => { event.preventDefault(); (at("grid").querySelector("a.card") ?? at("results")).focus(); });
  document.addEventListener("click", (event) => {
    const opened = event.target.closest("a.card");
    if (opened && !event.ctrlKey && !event.metaKey && !event.shiftKey && event.button === 0) {
      event.preventDefault();
      // from inside the panel the entry is replaced: one "back" leads to the results
      go({ item: opened.dataset.id, ask: null }, { mark: history.state === "panel" || !at("panel").open ? "panel" : null, replace: at("panel").open });
      render();
    }
    closeSheets(event.target.closest("details.pop"));
  });
  addEventListener("keydown", (event) => {
    const typing = event.target.closest?.("input, textarea, select");
    if (event.key === "/" && !typing && !at("panel").open && !event.ctrlKey && !event.metaKey) { event.preventDefault(); at("words").focus(); at("words").select(); }
    if (event.key === "Escape" && !at("panel").open) {
      const sheet = document.querySelector("details.pop[open]");
      if (sheet) { sheet.open = false; sheet.querySelector("summary").focus(); }
    }
    if (event.key === "ArrowDown" && event.target === at("words")) { const first = at("grid").querySelector("a.card"); if (first) { event.preventDefault(); first.focus(); } }
    else if (!typing && !at("panel").open) results.arrows(event);
  });
  addEventListener("popstate", () => render());
  addEventListener("moved", () => render());
  dragAndPaste();
  panel.wire();
  theme();
}

function theme() {
  const root = document.documentElement;
  const dark = () => root.dataset.theme === "dark" || (!root.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  const say = () => at("theme").setAttribute("aria-pressed", dark());
  at("theme").addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("theme", root.dataset.theme); } catch { /* not kept, still shown */ }
    say();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", say);
  say();
}

async function start() {
  if (new URLSearchParams(location.search).has("token")) history.replaceState(null, "", location.pathname + location.hash); // the cookie has it now
  results.skeletons(12);
  try {
    info = await api.info();
  } catch (error) {
    results.show([]);
    alertWith(error.message, el("button", { type: "button", class: "quiet", onclick: () => location.reload() }, "Try again"));
    return;
  }
  aboutRun();
  examples();
  filters.build(info, optionsPill());
  wire();
  render();
}

start();
