// What is being looked at lives in the address after #, so that back, forward, reload and a copied link all work.
//   q words · like item id · pic number of a picture held in memory · mode · rerank · k · w balance · where expert filter
//   f.COLUMN values or LOW..HIGH · item open item · ask 1 when the chosen picture itself is open

const KEYS = ["q", "like", "pic", "mode", "rerank", "k", "w", "where", "item", "ask"];

export function read() {
  const given = new URLSearchParams(location.hash.slice(1));
  const state = { filters: new Map() };
  for (const key of KEYS) if (given.has(key)) state[key] = given.get(key);
  for (const key of new Set(given.keys())) {
    if (key.startsWith("f.")) state.filters.set(key.slice(2), given.getAll(key));
  }
  return state;
}

export function link(state) {
  const out = new URLSearchParams();
  for (const key of KEYS) {
    if (state[key] !== undefined && state[key] !== null && state[key] !== "") out.set(key, state[key]);
  }
  for (const [column, values] of state.filters ?? []) for (const value of values) out.append(`f.${column}`, value);
  return `#${out}`;
}

/** Goes to the state with `changes`; null removes a key. `mark` is kept with the entry in the history. */
export function go(changes, { replace = false, mark = null } = {}) {
  const hash = link({ ...read(), ...changes });
  if (hash === (location.hash || "#") && !replace) return false;
  history[replace ? "replaceState" : "pushState"](mark, "", location.pathname + hash);
  return true;
}

/** Pictures chosen in this tab, by number. A reload forgets them: they are never written anywhere. */
export const pictures = new Map();
let next = 1;
export function keep(file) {
  const key = String(next++);
  pictures.set(key, { file, url: URL.createObjectURL(file) });
  return key;
}
