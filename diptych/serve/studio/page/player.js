// A picture with the steps that led to it: a slider, what is settled, the boxes planned, its recipe, what to do next.
import { el, svg, fill, button, toggle, icon } from "./dom.js";
import { withRecipe, save, dataUrl } from "./png.js";
import { FAMILY, call, evaluates, modelOf, showBlob } from "./state.js";

const SMALL = 320; // pixels: below, a picture is shown with its pixels as squares

export function player(label = "The picture") {
  const image = el("img", { alt: "", hidden: true });
  const cells = svg("svg", { class: "cells", preserveAspectRatio: "none", "aria-hidden": "true" });
  const plan = svg("svg", { class: "plan off", viewBox: "0 0 100 100", preserveAspectRatio: "none",
    "aria-hidden": "true" });
  const empty = el("div", { class: "empty" });
  const frame = el("div", { class: "frame" }, image, cells, plan, empty);
  const slider = el("input", { type: "range", min: 1, value: 1, step: 1,
    "aria-label": `Step of ${label.toLowerCase()}` });
  const where = el("output", { class: "where" });
  const play = button(icon("play"), () => run(), { class: "quiet square", "aria-label": "Play the steps" });
  const shade = toggle("Cells", (on) => cells.classList.toggle("off", !on), true);
  const boxes = toggle("Plan", (on) => plan.classList.toggle("off", !on));
  const steps = el("div", { class: "steps", hidden: true }, play, slider, where, shade, boxes);
  const family = el("p", { class: "hint" });
  const facts = el("p", { class: "facts" });
  const actions = el("div", { class: "row wrap" });
  const details = el("div");
  const node = el("div", { class: "player" }, frame, steps, family, facts, actions, details);
  let made = null; // {request, kind, result: {image, frames, recipe, ...}}
  let frames = [];
  let timer = 0;
  let linked = () => {};

  function show(place) {
    const { blob, progress } = frames[place];
    showBlob(image, blob);
    image.hidden = false;
    empty.hidden = true;
    slider.value = place + 1;
    const last = progress === null;
    const words = last ? "finished" : `step ${progress.step} of ${progress.steps}`;
    const more = last ? "" : progress.scale ? `, ${progress.scale.join(" x ")} codes`
      : progress.known ? `, ${share(progress.known)} settled` : progress.time !== undefined
        ? `, time ${progress.time.toFixed(2)}` : "";
    fill(where, words + more);
    slider.setAttribute("aria-valuetext", words + more);
    image.alt = `${label}${made?.request.prompt ? `: ${made.request.prompt}` : ""}, ${words}`;
    settle(last ? null : progress.known);
    plan.toggleAttribute("hidden", !last);
  }

  function settle(known) {
    cells.replaceChildren();
    if (!known) return;
    cells.setAttribute("viewBox", `0 0 ${known[0].length} ${known.length}`);
    known.forEach((row, y) => [...row].forEach((bit, x) => {
      if (bit === "0") cells.append(svg("rect", { x, y, width: 1, height: 1 }));
    }));
  }

  function run() {
    clearInterval(timer);
    let place = 0;
    show(place);
    timer = setInterval(() => {
      place += 1;
      if (place >= frames.length) clearInterval(timer);
      else show(place);
    }, Math.max(60, Math.min(400, 3000 / frames.length)));
  }

  slider.addEventListener("input", () => {
    clearInterval(timer);
    show(slider.value - 1);
    linked((slider.value - 1) / Math.max(1, frames.length - 1));
  });
  image.addEventListener("load", () => {
    image.classList.toggle("pixels", Math.max(image.naturalWidth, image.naturalHeight) < SMALL);
    frame.style.aspectRatio = `${image.naturalWidth} / ${image.naturalHeight}`;
  });

  function offer() {
    slider.max = frames.length;
    steps.hidden = frames.length < 2;
    shade.hidden = !frames.some((f) => f.progress?.known);
    boxes.hidden = !made?.result?.layout;
  }

  return {
    node, frame,
    /** Nothing yet: words that say what to do. */
    clear(...words) {
      frames = [];
      made = null;
      clearInterval(timer);
      image.hidden = true;
      empty.hidden = false;
      cells.replaceChildren();
      plan.replaceChildren();
      frame.style.aspectRatio = "";
      steps.hidden = true;
      fill(empty, ...words);
      for (const part of [family, facts, actions, details]) fill(part);
    },
    begin(request) {
      this.clear(el("p", {}, "Waiting for the first step"));
      made = { request };
    },
    /** A picture on the way. */
    step(blob, progress) {
      frames.push({ blob, progress });
      offer();
      show(frames.length - 1);
    },
    /** What came of it, kept or new: `record` of the history and which of its results. */
    finish(record, result) {
      made = { ...record, result };
      frames = [...result.frames, { blob: result.image, progress: null }];
      plan.replaceChildren(...(result.layout ?? []).map(outline));
      offer();
      show(frames.length - 1);
      const model = modelOf(result.recipe.model);
      const kind = model?.family.at(-1);
      fill(family, frames.length > 1 && kind && FAMILY[kind] ? `${kind}: ${FAMILY[kind]}.` : "");
      fill(facts, [result.recipe.model, `seed ${result.seed}`, evaluates(model) ? `${result.recipe.steps} steps` : "",
        `guidance ${result.recipe.guidance}`, result.size, result.seconds ? `${result.seconds} s` : ""]
        .filter(Boolean).join(" \u00b7 "));
      fill(actions, ...deeds(record, result));
      fill(details, el("details", {}, el("summary", {}, "Recipe"),
        el("pre", { tabindex: 0, "aria-label": "Recipe" }, JSON.stringify(result.recipe, null, 2))));
    },
    /** Another player follows this one's slider. */
    link(listener) { linked = listener; },
    goTo(part) { if (frames.length) show(Math.round(part * (frames.length - 1))); },
    get frames() { return frames; },
  };
}

const share = (known) => `${Math.round((100 * known.join("").replaceAll("0", "").length)
  / known.join("").length)}%`;

function outline({ label, box: [x0, y0, x1, y1] }) {
  return svg("rect", { x: x0 * 100, y: y0 * 100, width: (x1 - x0) * 100, height: (y1 - y0) * 100 },
    svg("title", {}, label ?? "box"));
}

function deeds(record, result) {
  const name = `diptych-${record.kind}-${result.recipe.model}-${result.seed}`;
  const recipe = () => wholeRecipe(record, result);
  const out = [
    button("Download", async () => save(await withRecipe(result.image, await recipe()), `${name}.png`),
      { title: "A PNG that carries its recipe" }),
    button("Recipe as JSON", async () => save(new Blob([JSON.stringify(await recipe(), null, 2)],
      { type: "application/json" }), `${name}.json`)),
    button("Repeat", () => call("repeat", record), { title: "Fill the form with this recipe" }),
    button("Edit this", () => call("edit", result.image)),
    button("Talk about it", () => call("attach", result.image)),
  ];
  return out.map((made) => { made.classList.add("quiet"); return made; });
}

/** Enough to make it again, pictures that went in included. */
export async function wholeRecipe(record, result) {
  const inputs = {};
  for (const [part, blob] of Object.entries(record.inputs ?? {})) if (blob) inputs[part] = await dataUrl(blob);
  return { diptych: 1, kind: record.kind, request: record.request, inputs, recipe: result?.recipe ?? null,
    made: new Date(record.made).toISOString() };
}
