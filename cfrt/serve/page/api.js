// The server's HTTP interface, and what the page keeps between visits. No state of the page itself.

const TOKEN = "cfrt-token";

/** Reads #s=ID,ID&token=TOKEN once, keeps the token for this tab and takes it out of the address. */
export function readAddress() {
  const fields = new URLSearchParams(location.hash.slice(1));
  if (fields.has("token")) sessionStorage.setItem(TOKEN, fields.get("token"));
  return (fields.get("s") ?? "").split(",").filter(Boolean);
}

/** The streams on this page, in its address: a reload or a shared link finds them again. */
export function writeAddress(ids) {
  history.replaceState(null, "", ids.length ? `#s=${ids.join(",")}` : location.pathname + location.search);
}

/** A path with the token, for what cannot send headers. */
export function withToken(path) {
  const token = sessionStorage.getItem(TOKEN);
  return token ? `${path}${path.includes("?") ? "&" : "?"}token=${encodeURIComponent(token)}` : path;
}

/** A request; the answer's JSON. Throws an Error with the server's own words and `status`. */
export async function call(method, path, body) {
  const headers = {};
  const token = sessionStorage.getItem(TOKEN);
  if (token) headers.Authorization = `Bearer ${token}`;
  if (body !== undefined && !(body instanceof Blob)) {
    headers["Content-Type"] = "application/json";
    body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(path, { method, headers, body });
  } catch {
    throw Object.assign(new Error("The server does not answer."), { status: 0 });
  }
  const answer = response.status === 204 ? null : await response.json().catch(() => null);
  if (!response.ok) throw Object.assign(new Error(answer?.error?.message ?? response.statusText), { status: response.status });
  return answer;
}

export const socketAddress = (id) =>
  withToken(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/streams/${encodeURIComponent(id)}/live?video=jpeg`);

/** A value in localStorage, where there is one. */
export function kept(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(`cfrt-${name}`)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

export function keep(name, value) {
  try {
    localStorage.setItem(`cfrt-${name}`, JSON.stringify(value));
  } catch {
    // private windows may refuse; the page works without
  }
}
