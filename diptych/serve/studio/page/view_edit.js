// Edit: a picture, words for what shall change, and where if it shall not be everywhere.
import { el, field, fill, button } from "./dom.js";
import { Refusal } from "./api.js";
import { chooser, catches } from "./files.js";
import { job } from "./job.js";
import { maskPainter } from "./mask.js";
import { draw } from "./picture_job.js";
import { player } from "./player.js";
import { sampling } from "./sampling.js";
import { keep, newId } from "./store.js";

export function editView() {
  const prompt = el("textarea", { rows: 2, maxlength: 4000, placeholder: "make the circle blue" });
  const how = sampling(["model", "watch", "seed", "steps", "guidance", "negative"]);
  const stage = player("Edited picture");
  const note = el("p", { class: "hint" });
  const drop = el("div", { class: "dropzone" }, el("p", {}, "Drop or paste a picture here"),
    chooser("Choose a picture", (files) => take(files[0])));
  const painter = maskPainter(button("Another picture", () => take(null), { class: "quiet" }));
  let source = null;

  const work = job("Change it", async (signal, told, seconds) => {
    if (!source) throw new Refusal("Choose a picture to change first.");
    if (!prompt.value.trim()) throw new Refusal("Say what shall change.");
    const body = { prompt: prompt.value.trim(), ...how.values() };
    const mask = await painter.blob();
    const form = new FormData();
    for (const [name, value] of Object.entries(body)) form.append(name, value);
    form.append("stream", "true");
    if (how.watch) form.append("partial_images", how.watch);
    form.append("image", source, "picture.png");
    if (mask) form.append("mask", mask, "mask.png");
    stage.begin(body);
    let result;
    try {
      result = await draw("/v1/images/edits", form, { player: stage, signal, told, seconds });
    } catch (error) {
      invite();
      throw error;
    }
    const record = { id: newId(), kind: "edit", made: Date.now(), title: body.prompt, request: body,
      inputs: { image: source, mask }, results: [result] };
    stage.finish(record, result);
    await keep(record);
  });

  async function take(blob, mask = null) {
    source = null;
    work.wrong.replaceChildren();
    painter.hide();
    if (blob) {
      try {
        source = await painter.show(blob);
        if (mask) await painter.load(mask);
      } catch {
        work.fail(new Refusal("This file is no picture that the browser can read."));
      }
    }
    drop.hidden = source !== null;
    fill(note, source ? "Paint where the picture may change; outside it is put back as it was. Unpainted, all of it "
      + "may change." : "");
  }

  const invite = () => stage.clear(el("p", {}, "The changed picture comes here."));

  const form = el("form", { class: "side" }, drop, painter.node, note, field("What shall change", prompt), work.parts,
    el("div", { class: "settings" }, how.fields.model, how.fields.watch,
      el("details", {}, el("summary", {}, "More settings"), how.fields.seed, how.fields.steps, how.fields.guidance,
        how.fields.negative)));
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
  catches(form, (files) => take(files[0]));
  invite();

  return {
    name: "edit", title: "Edit",
    node: el("div", { class: "two even" }, form, el("div", { class: "stage" }, stage.node)),
    refresh: () => how.refresh(),
    async open(blob) {
      await take(blob);
      prompt.focus();
    },
    async repeat(record) {
      how.load(record.request);
      prompt.value = record.request.prompt ?? "";
      await take(record.inputs?.image ?? null, record.inputs?.mask ?? null);
      if (record.results?.[0]) stage.finish(record, record.results[0]);
      prompt.focus();
    },
  };
}
