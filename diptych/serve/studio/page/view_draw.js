// Draw: from words, from boxes, or both; every step stays to be looked at.
import { el, field, button, toggle } from "./dom.js";
import { Refusal } from "./api.js";
import { boxEditor } from "./boxes.js";
import { job } from "./job.js";
import { draw } from "./picture_job.js";
import { player } from "./player.js";
import { sampling } from "./sampling.js";
import { keep, newId } from "./store.js";

const EXAMPLES = ["a large red circle", "a blue square left of a yellow star", "two green triangles"];

export function drawView() {
  const prompt = el("textarea", { rows: 3, maxlength: 4000, placeholder: "a large red circle" });
  const boxes = boxEditor();
  const sheet = el("div", { hidden: true }, boxes.node);
  const placing = toggle("Place boxes", (on) => {
    sheet.hidden = !on;
    plan.parentNode.hidden = on;
  });
  const plan = el("input", { type: "checkbox" });
  const how = sampling(["model", "watch", "seed", "steps", "guidance", "size", "negative"], (model) => {
    plan.checked = model.plan;
  });
  const stage = player("Drawing");
  const work = job("Draw", async (signal, told, seconds) => {
    const body = asked();
    stage.begin(body);
    const more = how.watch ? { stream: true, partial_images: how.watch } : { stream: true };
    let result;
    try {
      result = await draw("/v1/images/generations", { ...body, ...more }, { player: stage, signal, told, seconds });
    } catch (error) {
      invite();
      throw error;
    }
    const record = { id: newId(), kind: "draw", made: Date.now(), title: body.prompt || "A layout", request: body,
      results: [result] };
    stage.finish(record, result);
    await keep(record);
  });

  function asked() {
    const body = { prompt: prompt.value.trim(), ...how.values() };
    if (!sheet.hidden && boxes.size) {
      try {
        body.boxes = boxes.values();
      } catch (error) {
        throw new Refusal(`A box has no label: ${error.message}.`);
      }
    }
    if (!body.prompt && !body.boxes) throw new Refusal("Say what to draw, or place boxes with labels.");
    if (!body.boxes) body.plan = plan.checked;
    return body;
  }

  function invite() {
    stage.clear(el("p", {}, "Say what to draw, or place boxes, and watch the picture form."),
      el("div", { class: "chips" }, EXAMPLES.map((words) => button(words, () => {
        prompt.value = words;
        work.start();
      }, { class: "chip" }))));
  }

  const form = el("form", { class: "side" },
    field("What to draw", prompt),
    el("div", { class: "row wrap" }, placing,
      el("label", { class: "check" }, plan, "Let the model place boxes first")),
    sheet, work.parts,
    el("div", { class: "settings" }, how.fields.model, how.fields.watch,
      el("details", {}, el("summary", {}, "More settings"), how.fields.seed, how.fields.steps, how.fields.guidance,
        how.fields.size, how.fields.negative)));
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
  invite();

  return {
    name: "draw", title: "Draw", node: el("div", { class: "two" }, form, el("div", { class: "stage" }, stage.node)),
    refresh: () => how.refresh(),
    repeat(record) {
      how.load(record.request);
      prompt.value = record.request.prompt ?? "";
      boxes.load(record.request.boxes ?? []);
      if (placing.getAttribute("aria-pressed") !== String(Boolean(record.request.boxes))) placing.click();
      plan.checked = Boolean(record.request.plan);
      if (record.results?.[0]) stage.finish(record, record.results[0]);
      prompt.focus();
    },
  };
}
