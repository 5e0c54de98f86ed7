// Compare: the same words and the same seed, two models or two ways of sampling, side by side.
import { el, field } from "./dom.js";
import { Refusal } from "./api.js";
import { job } from "./job.js";
import { draw } from "./picture_job.js";
import { player } from "./player.js";
import { sampling } from "./sampling.js";
import { state, randomSeed } from "./state.js";
import { keep, newId } from "./store.js";

export function compareView() {
  const prompt = el("textarea", { rows: 2, maxlength: 4000, placeholder: "a large red circle" });
  const shared = sampling(["seed", "watch"]);
  const sides = ["Left", "Right"].map((name) => {
    const how = sampling(["model", "steps", "guidance"]);
    const stage = player(`${name} picture`);
    const legend = el("h2", {}, name);
    return { how, stage, node: el("section", { class: "pane", "aria-label": name }, legend,
      el("div", { class: "fields" }, how.fields.model, how.fields.steps, how.fields.guidance), stage.node) };
  });
  sides.forEach(({ stage }, i) => stage.link((part) => sides[1 - i].stage.goTo(part)));
  const only = el("p", { class: "hint", hidden: true },
    "One model is served: compare ways of sampling, or start the server with --model twice.");

  const work = job("Compare", async (signal, told, seconds) => {
    const words = prompt.value.trim();
    if (!words) throw new Refusal("Say what both shall draw.");
    const seed = Number(shared.inputs.seed.value) || randomSeed();
    const bodies = sides.map(({ how }) => ({ prompt: words, ...how.values(), seed }));
    const steps = sides.map(() => 0);
    const results = await both(sides.map(({ stage }, i) => async (stop) => {
      stage.begin(bodies[i]);
      return draw("/v1/images/generations", { ...bodies[i], stream: true, partial_images: shared.watch },
        { player: stage, signal: stop, seconds, told: (news, share) => {
          steps[i] = share ?? 0;
          told(`${bodies[i].model}: ${news.toLowerCase()}`, Math.min(...steps));
        } });
    }), signal).catch((error) => {
      invite();
      throw error;
    });
    const record = { id: newId(), kind: "compare", made: Date.now(), title: words, request: { prompt: words, seed,
      sides: bodies }, results };
    sides.forEach(({ stage }, i) => stage.finish({ ...record, kind: "draw", request: bodies[i] }, results[i]));
    await keep(record);
  });

  /** If one of them fails, the other is given up. */
  async function both(works, signal) {
    const controller = new AbortController();
    signal.addEventListener("abort", () => controller.abort());
    try {
      return await Promise.all(works.map((begin) => begin(controller.signal)));
    } catch (error) {
      controller.abort();
      throw error;
    }
  }

  const invite = () => sides.forEach(({ stage }) => stage.clear(el("p", {}, "The same prompt, the same seed.")));

  const form = el("form", { class: "top" }, field("What both shall draw", prompt),
    el("div", { class: "fields" }, shared.fields.seed, shared.fields.watch), only, work.parts);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    work.start();
  });
  invite();

  return {
    name: "compare", title: "Compare",
    node: el("div", {}, form, el("div", { class: "panes" }, sides.map((side) => side.node))),
    refresh() {
      sides.forEach(({ how }) => how.refresh());
      if (state.models.length > 1 && sides[1].how.inputs.model.value === sides[0].how.inputs.model.value) {
        sides[1].how.inputs.model.value = state.models[1].id;
        sides[1].how.adapt();
      }
      only.hidden = state.models.length !== 1;
    },
    repeat(record) {
      prompt.value = record.request.prompt;
      shared.inputs.seed.value = record.request.seed;
      sides.forEach(({ how, stage }, i) => {
        how.load(record.request.sides[i]);
        if (record.results?.[i]) {
          stage.finish({ ...record, kind: "draw", request: record.request.sides[i] }, record.results[i]);
        }
      });
      prompt.focus();
    },
  };
}
