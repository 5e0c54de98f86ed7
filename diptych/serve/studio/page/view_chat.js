// Chat: words and pictures in both directions; the conversation is kept and goes on after a reload.
import { el, field, fill, choice, button } from "./dom.js";
import { Refusal, stream } from "./api.js";
import { chooser, catches } from "./files.js";
import { job } from "./job.js";
import { dataUrl, ofDataUrl, save, withRecipe } from "./png.js";
import { wholeRecipe } from "./player.js";
import { sampling } from "./sampling.js";
import { call, showBlob } from "./state.js";
import { all, keep, newId } from "./store.js";

const ANSWERS = [["text", "words"], ["image", "a picture"], ["text,image", "words, then a picture"],
  ["image,text", "a picture, then words"], ["boxes", "boxes"]];
const TRIES = [["Draw something", "draw a large red circle", "image"],
  ["Attach a picture and ask", "describe the picture", "text"]];

export function chatView() {
  const log = el("div", { class: "log", role: "log", "aria-label": "Conversation", tabindex: 0 });
  const prompt = el("textarea", { rows: 1, maxlength: 8000, placeholder: "Say something", "aria-label": "Message" });
  const answer = choice(ANSWERS);
  const tokens = el("input", { type: "number", min: 1, max: 100000, placeholder: "as many as allowed" });
  const heat = el("input", { type: "number", min: 0, max: 2, step: "any", placeholder: "the model's own" });
  const how = sampling(["model", "seed", "steps", "guidance"]);
  const tray = el("ul", { class: "tray", "aria-label": "Pictures to send" });
  let talk = begin();
  let pending = [];

  function begin() {
    return { id: newId(), kind: "chat", made: Date.now(), title: "", request: {}, messages: [] };
  }

  const work = job("Send", async (signal, said) => {
    const words = prompt.value.trim();
    if (!words && !pending.length) throw new Refusal("Write something, or attach a picture.");
    const sent = { role: "user", parts: [...pending.map((image) => ({ image })), ...(words ? [{ text: words }] : [])] };
    const here = talk;
    const chosen = settings();
    const body = await asked(chosen, [...here.messages, sent]);
    if (!here.messages.length) fill(log);
    const mine = bubble(sent);
    const reply = { role: "assistant", parts: [] };
    const theirs = bubble(reply);
    theirs.classList.add("busy");
    log.append(mine, theirs);
    [prompt.value, pending] = ["", []];
    trayed();
    try {
      for await (const [, data] of stream("/v1/chat/completions", body, signal)) {
        const { delta, finish_reason: reason } = data.choices[0] ?? { delta: {} };
        if (delta.refusal) throw new Refusal(delta.refusal);
        for (const part of delta.content ?? []) hear(reply, part);
        if (data.recipe) reply.recipe = data.recipe;
        if (reason === "length") reply.cut = true;
        said("Answering");
        fill(theirs, ...shown(reply));
        log.scrollTop = log.scrollHeight;
      }
      theirs.classList.remove("busy");
      if (chosen.answer.includes("text") && !reply.parts.some((p) => "text" in p)) reply.parts.push({ text: "" });
      here.messages.push(sent, reply);
      Object.assign(here, { made: Date.now(), title: here.title || words || "A picture", request: chosen });
      fill(theirs, ...shown(reply));
      log.scrollTop = log.scrollHeight;
      await keep(here);
    } catch (error) {
      mine.remove();
      theirs.remove();
      if (!here.messages.length) invite();
      prompt.value ||= words;
      pending = sent.parts.filter((p) => p.image).map((p) => p.image);
      trayed();
      throw error;
    }
  }, { class: "primary" });

  const settings = () => ({ ...how.values(), answer: answer.value, max_tokens: tokens.value, temperature: heat.value });

  async function asked({ answer: kinds, max_tokens: most, temperature, ...others }, messages) {
    const body = { ...others, stream: true, content_format: "parts", answer: kinds.split(",") };
    if (most) body.max_tokens = Number(most);
    if (temperature) body.temperature = Number(temperature);
    body.messages = await Promise.all(messages.map(async ({ role, parts }) => ({ role,
      content: await Promise.all(parts.filter((p) => p.text !== "").map(async (p) => (p.image
        ? { type: "image_url", image_url: { url: await dataUrl(p.image) } }
        : p.boxes ? { type: "diptych", diptych: p.boxes } : { type: "text", text: p.text }))) })));
    return body;
  }

  function hear(reply, part) {
    const before = reply.parts.find((p) => p.place === part.index);
    if (part.type === "text" && before) before.text += part.text;
    else if (part.type === "text") reply.parts.push({ place: part.index, text: part.text });
    else if (part.type === "image_url") reply.parts.push({ place: part.index, image: ofDataUrl(part.image_url.url) });
    else if (part.type === "diptych") reply.parts.push({ place: part.index, boxes: part.diptych });
  }

  const bubble = (message) => el("article", { class: `message ${message.role}` }, shown(message));

  function shown(message) {
    const who = el("h3", { class: "unseen" }, message.role === "user" ? "You" : "The model");
    const parts = message.parts.map((part) => {
      if (part.image) return pictured(message, part.image);
      if (part.boxes) return boxed(part.boxes);
      return el("p", { class: "said" }, part.text || "(nothing)");
    });
    if (message.role === "assistant" && !parts.length) parts.push(el("p", { class: "said dots" }, "..."));
    if (message.cut) parts.push(el("p", { class: "hint" }, "The answer ends where it has all the tokens it may have."));
    return [who, ...parts];
  }

  function pictured(message, blob) {
    const image = el("img", { alt: message.role === "user" ? "Picture sent" : "Picture drawn by the model" });
    image.addEventListener("load", () => image.classList.toggle("pixels", image.naturalWidth < 320));
    showBlob(image, blob);
    const row = el("div", { class: "row wrap" },
      button("Edit this", () => call("edit", blob), { class: "quiet small" }),
      message.role === "user" ? null : button("Download", () => download(message, blob), { class: "quiet small" }));
    return el("figure", {}, image, row);
  }

  async function download(message, blob) {
    const asking = talk.messages.slice(0, talk.messages.indexOf(message)).map(({ role, parts }) => ({ role,
      words: parts.map((p) => p.text).filter(Boolean).join(" ") }));
    const record = { kind: "chat", made: talk.made, request: { ...talk.request, messages: asking } };
    const facts = await wholeRecipe(record, { recipe: message.recipe });
    save(await withRecipe(blob, facts), `diptych-chat-${message.recipe?.seed ?? ""}.png`);
  }

  function boxed({ boxes, labels }) {
    return el("ul", { class: "said" }, boxes.map((box, i) => el("li", {},
      `${labels?.[i] ?? "box"}: ${box.map((v) => v.toFixed(2)).join(", ")}`)));
  }

  function trayed() {
    fill(tray, pending.map((blob, i) => {
      const image = el("img", { alt: `Picture ${i + 1} to send` });
      showBlob(image, blob);
      return el("li", {}, image, button("\u00d7", () => {
        pending.splice(i, 1);
        trayed();
      }, { "aria-label": `Remove picture ${i + 1}` }));
    }));
    tray.hidden = !pending.length;
  }

  function attach(blobs) {
    pending.push(...blobs.slice(0, 8));
    trayed();
    prompt.focus();
  }

  function invite() {
    const tries = TRIES.map(([name, words, kind]) => button(name, () => {
      prompt.value = words;
      answer.value = kind;
      prompt.focus();
    }, { class: "chip" }));
    fill(log, el("div", { class: "empty" }, el("p", {}, "Talk with the model. Attach, paste or drop pictures; choose "
      + "below what it shall answer with."), el("div", { class: "chips" }, tries)));
  }

  function open(record) {
    talk = record;
    fill(log, record.messages.map(bubble));
    if (!record.messages.length) invite();
    log.scrollTop = log.scrollHeight;
  }

  const anew = button("New conversation", () => {
    open(begin());
    prompt.focus();
  }, { class: "quiet" });
  const form = el("form", { class: "composer" }, tray,
    el("div", { class: "row ask" }, chooser("Attach pictures", attach, { many: true }), prompt, work.parts[0]),
    work.parts.slice(1),
    el("div", { class: "row wrap below" }, field("Answer with", answer), how.fields.model,
      el("details", {}, el("summary", {}, "More settings"), how.fields.seed, how.fields.steps, how.fields.guidance,
        field("Temperature", heat), field("Tokens", tokens)), anew));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    work.start();
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      work.start();
    }
  });
  const node = el("div", { class: "chat" }, log, form);
  catches(node, attach);
  trayed();
  invite();
  all().then((records) => {
    const last = records.find((record) => record.kind === "chat");
    if (last && !talk.messages.length && !work.busy) open(last);
  }).catch(() => {}); // no storage in this browser: the conversation is not kept

  return {
    name: "chat", title: "Chat", node, refresh: () => how.refresh(), attach: (blob) => attach([blob]),
    repeat(record) {
      how.load({ ...record.request, seed: undefined }); // what is said next is new
      answer.value = record.request.answer ?? "text";
      tokens.value = record.request.max_tokens ?? "";
      heat.value = record.request.temperature ?? "";
      open(record.id ? record : begin());
      if (!record.id) prompt.value = record.request.messages?.findLast((m) => m.role === "user")?.words ?? "";
      prompt.focus();
    },
  };
}
