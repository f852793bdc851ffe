// The four calls the page makes. Addresses are relative, so the demo also works under a proxy's sub-path.

export class Failed extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function call(address, options = {}) {
  let reply;
  try {
    reply = await fetch(address, { credentials: "same-origin", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failed("The demo does not answer. Is it still running in its terminal?", 0);
  }
  let body = null;
  try {
    body = await reply.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
  }
  if (!reply.ok || body === null) {
    throw new Failed(body?.error ?? `The demo replied with status ${reply.status} and no explanation.`, reply.status);
  }
  return body;
}

function form(fields) {
  const data = new FormData();
  for (const [name, value] of Object.entries(fields)) {
    if (value !== undefined && value !== null && value !== "") data.append(name, value);
  }
  return data;
}

export const address = (id, part = "") => `api/items/${encodeURIComponent(id)}${part && "/" + part}`;
export const info = () => call("api/info");
export const browse = (limit, where, signal) =>
  call(`api/items?${new URLSearchParams(where ? { limit, where } : { limit })}`, { signal });
export const item = (id, signal) => call(address(id), { signal });
export const search = (fields, signal) => call("api/search", { method: "POST", body: form(fields), signal });
export const answer = (fields, signal) => call("api/answer", { method: "POST", body: form(fields), signal });
