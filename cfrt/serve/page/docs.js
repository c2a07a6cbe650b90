// The API's documentation, drawn from openapi.json: what FastAPI's own page would show, with nothing from elsewhere.

const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

function resolved(schema, api) {
  if (schema?.$ref) return resolved(schema.$ref.slice(2).split("/").reduce((at, key) => at[key], api), api);
  return schema ?? {};
}

function kind(schema, api) {
  if (schema.$ref) return kind({ ...resolved(schema, api), $ref: undefined }, api);
  if (schema.anyOf) return schema.anyOf.map((one) => kind(one, api)).join(" or ");
  if (schema.enum) return schema.enum.join(" | ");
  if (schema.type === "array") return `list of ${kind(schema.items ?? {}, api)}`;
  const bounds = [schema.minimum ?? schema.anyOf?.[0]?.minimum, schema.maximum].filter((bound) => bound !== undefined);
  return (schema.title && schema.type === "object" ? schema.title : (schema.type ?? "")) + (bounds.length === 2 ? ` ${bounds.join(" to ")}` : "");
}

function fields(schema, api) {
  const { properties = {}, required = [] } = resolved(schema, api);
  const rows = Object.entries(properties).map(([name, one]) =>
    make("tr", {}, make("td", { textContent: name + (required.includes(name) ? "" : "?") }), make("td", { textContent: kind(one, api) }), make("td", { textContent: one.description ?? "" })),
  );
  return make("table", {}, make("tbody", {}, ...rows));
}

function example(method, path, operation, api) {
  const body = operation.requestBody?.content ?? {};
  const json = body["application/json"] && " -H 'Content-Type: application/json' -d '" + (path === "/streams" ? '{"prompt": "a red circle moving left"}' : '{"prompt": "a blue square moving up"}') + "'";
  const file = body["image/png"] && " -H 'Content-Type: image/png' --data-binary @picture.png";
  const verb = method === "get" ? "" : ` -X ${method.toUpperCase()}`;
  return `curl${verb} ${location.origin}${path.replace("{name}", "$ID")}${json || file || ""}`;
}

function draw(method, path, operation, api) {
  const body = operation.requestBody?.content?.["application/json"]?.schema;
  const answer = Object.entries(operation.responses).find(([code]) => code.startsWith("2"));
  const schema = answer?.[1].content?.["application/json"]?.schema;
  const inside = make("div", {}, make("p", { textContent: operation.description ?? "" }));
  const query = (operation.parameters ?? []).filter((one) => one.in === "query");
  if (query.length) inside.append(fields({ properties: Object.fromEntries(query.map((one) => [one.name, { ...one.schema, description: one.description ?? one.schema.description }])) }, api));
  if (body) inside.append(fields(body, api));
  inside.append(make("pre", { textContent: example(method, path, operation, api) }));
  if (schema && resolved(schema, api).properties) inside.append(make("p", { textContent: `Answer, ${answer[0]}:` }), fields(schema, api));
  const head = make("summary", {}, make("b", { textContent: method.toUpperCase() }), make("code", { textContent: path.replace("{name}", "{id}") }), make("span", { textContent: (operation.description ?? "").split(/[.:;](\s|$)/)[0] }));
  return make("details", {}, head, inside);
}

const api = await (await fetch("openapi.json")).json();
const groups = new Map();
for (const [path, methods] of Object.entries(api.paths))
  for (const [method, operation] of Object.entries(methods)) {
    const tag = operation.tags?.[0] ?? "other";
    groups.set(tag, [...(groups.get(tag) ?? []), draw(method, path, operation, api)]);
  }
const about = api.info.description.trim().split("\n\n").map((text) => make("p", { textContent: text.replaceAll("`", "") }));
document.getElementById("docs").replaceChildren(...about, ...[...groups].flatMap(([tag, items]) => [make("h2", { textContent: tag }), ...items]));
