// Talking to the server that this page came from.
import { el, field } from "./dom.js";

const KEY = "diptych-key"; // kept for this tab only

/** What went wrong, in words for people. */
export class Refusal extends Error {
  constructor(message, { status = 0, param = null, retry = null } = {}) {
    super(message);
    Object.assign(this, { status, param, retry });
  }
}

export async function request(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
    const answer = await reach(path, { ...options, headers });
    if (answer.ok) return answer;
    const refusal = await understood(answer);
    if (answer.status !== 401) throw refusal;
    if (sessionStorage.getItem(KEY) === key) await askForKey(key ? refusal.message : "");
  }
}

async function reach(path, options) {
  try {
    return await fetch(path, { ...options, credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server cannot be reached. Is it still running?");
  }
}

async function understood(answer) {
  const retry = answer.headers.get("retry-after");
  let told = `The server answered with status ${answer.status}.`;
  let param = null;
  try {
    const { error } = await answer.json();
    told = error.message;
    param = error.param;
  } catch {
    // not in the form of the API: a proxy, perhaps
  }
  return new Refusal(told, { status: answer.status, param, retry });
}

export async function get(path, signal) {
  return (await request(path, { signal })).json();
}

/** Events of a stream as [name, data]; ends quietly at [DONE], throws what the server says went wrong. */
export async function* stream(path, body, signal) {
  const form = body instanceof FormData;
  const answer = await request(path, {
    method: "POST", signal, body: form ? body : JSON.stringify(body),
    headers: form ? {} : { "content-type": "application/json" },
  });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const told = parsed(block);
      if (told === null) continue;
      if (told[0] === "error") throw new Refusal(told[1].error.message, { param: told[1].error.param });
      yield told;
    }
  }
  if (text.trim()) throw new Refusal("The connection broke before the answer was complete.");
}

function parsed(block) {
  let name = "";
  let data = null;
  for (const line of block.split("\n")) {
    if (line.startsWith("event: ")) name = line.slice(7);
    if (line.startsWith("data: ")) data = line.slice(6);
  }
  return data === null || data === "[DONE]" ? null : [name, JSON.parse(data)];
}

let asking = null;

/** One dialog, however many requests wait for it. */
function askForKey(refused) {
  asking ??= new Promise((resolve, reject) => {
    const input = el("input", { type: "password", required: true, autocomplete: "off", spellcheck: "false" });
    const form = el("form", { method: "dialog" },
      el("h2", {}, "This server wants a key"),
      el("p", { class: "note" }, refused || "It is kept for this tab only and sent to this server alone."),
      field("API key", input),
      el("div", { class: "row" }, el("button", { class: "primary" }, "Use this key"),
        el("button", { type: "button", class: "quiet", onclick: () => dialog.close() }, "Not now")));
    const dialog = el("dialog", { "aria-label": "API key" }, form);
    form.addEventListener("submit", () => {
      sessionStorage.setItem(KEY, input.value.trim());
      resolve();
    });
    dialog.addEventListener("close", () => {
      dialog.remove();
      asking = null;
      reject(new Refusal("This server wants an API key. Reload the page to enter one.", { status: 401 }));
    });
    document.body.append(dialog);
    dialog.showModal();
  });
  return asking;
}
