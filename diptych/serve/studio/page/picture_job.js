// Asking for a picture as a stream, and showing it as it forms.
import { stream, Refusal } from "./api.js";
import { blobOf } from "./png.js";

/** Streams into a player; the result as the history keeps it. */
export async function draw(path, body, { player, signal, told, seconds }) {
  const frames = [];
  let planned = false;
  for await (const [name, data] of stream(path, body, signal)) {
    const blob = blobOf(data.b64_json);
    if (name.endsWith("partial_image")) {
      const { progress = { step: frames.length + 1, steps: frames.length + 2 } } = data;
      frames.push({ blob, progress });
      player.step(blob, progress);
      planned = true;
      told(`Step ${progress.step} of ${progress.steps}`, progress.step / progress.steps);
    } else if (name.endsWith("completed")) {
      return { image: blob, frames, recipe: data.recipe, seed: data.seed, size: data.size, layout: data.layout ?? null,
        seconds: seconds() };
    }
  }
  throw new Refusal(planned ? "The connection broke before the picture was finished." : "The server sent no picture.");
}
