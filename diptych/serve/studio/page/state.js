// What the views share: the models of the server, and calls from one view to another.

export const state = { models: [] };

export const modelOf = (name) => state.models.find((model) => model.id === name) ?? state.models[0];

const handlers = new Map();

/** `on("edit", f)`: f is called by `call("edit", ...)` from anywhere. */
export const on = (name, handler) => handlers.set(name, handler);
export const call = (name, ...args) => handlers.get(name)?.(...args);

export const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;

/** A picture that the page shows: freed when it is replaced. */
export function showBlob(image, blob) {
  if (image.src.startsWith("blob:")) URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(blob);
}

export function count(number, unit) {
  return `${number.toLocaleString("en")} ${unit}${number === 1 ? "" : "s"}`;
}

/** Whether it is asked so many times for a picture: codes one by one or scale by scale are as many as they are. */
export const evaluates = (model) => !["next token", "next scale"].includes(model?.family.at(-1));

/** What a step of a model of this family shows. */
export const FAMILY = {
  flow: "every step shows the picture that the model expects at the end",
  "next token": "codes are drawn one after the other, row by row; the shaded cells are still to come",
  "next scale": "the picture is drawn again and again on finer grids",
  "masked tokens": "every step shows the picture expected; the shaded cells are not settled yet",
  "masked autoregression": "tokens appear in a random order; the shaded cells are still to come",
  "discrete flow": "every step shows the picture expected; the shaded cells differ from it still",
};
