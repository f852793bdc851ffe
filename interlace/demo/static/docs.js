// The API's page, written from /openapi.json as text.

import { at, el } from "./dom.js";

const short = (ref) => ref.split("/").at(-1);

function type(schema = {}) {
  if (schema.$ref) return el("a", { href: `#${short(schema.$ref)}` }, short(schema.$ref));
  if (schema.anyOf) {
    const kinds = schema.anyOf.filter((s) => s.type !== "null");
    return el("span", {}, ...kinds.flatMap((s, i) => (i ? [" or ", type(s)] : [type(s)])));
  }
  if (schema.enum) return schema.enum.map((v) => JSON.stringify(v)).join(" | ");
  if (schema.type === "array") return el("span", {}, "list of ", type(schema.items));
  if (schema.additionalProperties) return el("span", {}, "names to ", type(schema.additionalProperties));
  if (schema.format === "binary" || schema.contentMediaType) return "file";
  const bounds = [[schema.minimum, "from"], [schema.maximum, "to"], [schema.maxLength, "at most", "characters"]]
    .filter(([value]) => value !== undefined).map(([value, before, after]) => [before, value, after].filter((part) => part !== undefined).join(" ")).join(" ");
  return [schema.type ?? "anything", bounds].filter(Boolean).join(", ");
}

const row = (name, schema, required, description) => el("tr", {}, el("td", {}, el("code", {}, name)), el("td", {}, type(schema)),
  el("td", {}, required ? "needed" : schema?.default !== undefined ? `default ${JSON.stringify(schema.default)}` : ""), el("td", {}, description ?? ""));

const table = (head, rows) => el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ...head.map((h) => el("th", { scope: "col" }, h)))), el("tbody", {}, ...rows)));

function fields(schema) {
  return Object.entries(schema.properties ?? {}).map(([name, s]) => row(name, s, schema.required?.includes(name), s.description));
}

function example(verb, path, form) {
  const base = location.href.replace(/docs.*$/, "");
  const address = base.replace(/\/$/, "") + path.replace(/\{(\w+)(:path)?\}/g, "ID");
  if (verb === "get") return `curl '${address}'`;
  const names = Object.keys(form?.properties ?? {});
  return `curl '${address}'` + (names.includes("text") ? " -F text='red chair' -F k=5" : " -F item=ID -F question='what is this?'")
    + (names.includes("picture") ? `\ncurl '${address}' -F picture=@photo.jpg` + (names.includes("question") ? " -F question='what is this?'" : " -F text='in oak' -F weight=0.5") : "");
}

function operation(api, path, verb, op) {
  const body = Object.values(op.requestBody?.content ?? {})[0]?.schema;
  const form = body?.$ref ? api.components.schemas[short(body.$ref)] : body;
  const reply = op.responses["200"]?.content ?? {};
  const says = reply["application/json"] ? type(reply["application/json"].schema) : Object.keys(reply)[0];
  const inputs = [...(op.parameters ?? []).map((p) => row(p.name, p.schema, p.required, p.description ?? p.schema.description)), ...(form ? fields(form) : [])];
  const id = `${verb}${path.replaceAll(/\W+/g, "-")}`;
  return el("section", { "aria-labelledby": id },
    el("h2", { id }, el("span", { class: `verb ${verb}` }, verb.toUpperCase()), el("code", {}, path.replace(":path", ""))),
    el("p", {}, op.description ?? ""),
    inputs.length ? el("h3", {}, form ? "Form fields" : "Parameters") : null, inputs.length ? table(["name", "type", "", ""], inputs) : null,
    el("h3", {}, "Reply"), el("p", {}, says ?? ""), el("h3", {}, "Example"), el("pre", { tabindex: "0" }, example(verb, path, form)));
}

function model(name, schema) {
  return el("section", { id: name, "aria-labelledby": `of-${name}` }, el("h2", { id: `of-${name}` }, el("code", {}, name)), el("p", {}, schema.description ?? ""), table(["field", "type", "", ""], fields(schema)));
}

try {
  const api = await (await fetch("openapi.json", { credentials: "same-origin" })).json();
  at("state").textContent = api.info.description;
  at("doc").append(el("p", {}, "Requests that fail get a JSON object with the single field error, a sentence to show a person. With a token, send the header Authorization: Bearer TOKEN. An id may contain any characters: percent-encode it."));
  for (const [path, verbs] of Object.entries(api.paths)) for (const [verb, op] of Object.entries(verbs)) at("doc").append(operation(api, path, verb, op));
  for (const [name, schema] of Object.entries(api.components.schemas)) {
    if (!/^(Body_|HTTPValidationError|ValidationError)/.test(name)) at("doc").append(model(name, schema));
  }
} catch {
  at("state").textContent = "The description could not be loaded. Is the demo still running?";
}
