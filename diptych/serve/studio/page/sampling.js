// The fields that say how something is made: model, seed, steps, guidance and what else the chosen model takes.
import { el, field, choice, button, icon } from "./dom.js";
import { state, evaluates, modelOf, randomSeed } from "./state.js";

const WATCH = [["64", "every step"], ["3", "three pictures on the way"], ["0", "only the result"]];

const number = (properties) => el("input", { type: "number", inputmode: "decimal", ...properties });

/** `parts`: which of model, seed, steps, guidance, negative, size, watch there are. */
export function sampling(parts, changed = () => {}) {
  const inputs = {
    model: choice(state.models.map((m) => [m.id, m.id])),
    seed: number({ min: 0, max: Number.MAX_SAFE_INTEGER, step: 1, placeholder: "random" }),
    steps: number({ min: 1, max: 250, step: 1 }),
    guidance: number({ min: 0, max: 50, step: "any" }),
    negative: el("input", { type: "text", maxlength: 1000, placeholder: "what it should not show" }),
    size: el("input", { type: "text", pattern: "auto|[0-9]+x[0-9]+" }),
    watch: choice(WATCH),
  };
  const dice = button(icon("dice"), () => { inputs.seed.value = randomSeed(); },
    { class: "quiet square", "aria-label": "Draw a seed" });
  const words = { model: "Model", steps: "Steps", guidance: "Guidance", negative: "Without", size: "Size",
    watch: "Show" };
  const fields = Object.fromEntries(parts.map((name) => [name, name === "seed"
    ? field("Seed", inputs.seed) : field(words[name], inputs[name])]));
  if (fields.seed) fields.seed.append(dice), fields.seed.classList.add("with-button");

  /** Defaults differ from model to model, and not every model takes everything. */
  function adapt() {
    const model = modelOf(inputs.model.value);
    if (!model) return;
    inputs.steps.placeholder = model.steps;
    inputs.guidance.placeholder = model.guidance;
    inputs.size.placeholder = model.size ?? "auto";
    if (fields.steps) fields.steps.hidden = !evaluates(model);
    if (fields.negative) fields.negative.hidden = !model.negative_prompt;
    changed(model);
  }
  inputs.model.addEventListener("change", adapt);

  return {
    inputs, fields, adapt,
    get model() { return modelOf(inputs.model.value); },
    refresh() {
      const chosen = inputs.model.value;
      inputs.model.replaceChildren(...state.models.map((m) => el("option", { value: m.id }, m.id)));
      if (state.models.some((m) => m.id === chosen)) inputs.model.value = chosen;
      adapt();
    },
    /** As the server takes it. A seed is always said, so that what comes can be repeated. */
    values() {
      const out = { model: inputs.model.value, seed: inputs.seed.value ? Number(inputs.seed.value) : randomSeed() };
      if (parts.includes("steps") && !fields.steps.hidden && inputs.steps.value) {
        out.num_inference_steps = Number(inputs.steps.value);
      }
      if (parts.includes("guidance") && inputs.guidance.value) out.guidance_scale = Number(inputs.guidance.value);
      const negative = parts.includes("negative") && !fields.negative.hidden && inputs.negative.value.trim();
      if (negative) out.negative_prompt = negative;
      if (parts.includes("size") && inputs.size.value.trim()) out.size = inputs.size.value.trim();
      return out;
    },
    get watch() { return Number(inputs.watch.value); },
    /** The other way round, from a request that was kept. */
    load(asked) {
      if (state.models.some((m) => m.id === asked.model)) inputs.model.value = asked.model;
      inputs.seed.value = asked.seed ?? "";
      inputs.steps.value = asked.num_inference_steps ?? "";
      inputs.guidance.value = asked.guidance_scale ?? "";
      inputs.negative.value = asked.negative_prompt ?? "";
      inputs.size.value = asked.size ?? "";
      adapt();
    },
  };
}
