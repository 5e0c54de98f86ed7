// Pictures from people: chosen, pasted or dropped.
import { el, icon } from "./dom.js";

export const KINDS = "image/png,image/jpeg,image/webp,image/gif,image/bmp,image/avif,image/svg+xml";

const pictures = (list) => [...(list ?? [])].filter((file) => file.type.startsWith("image/"));

/** A button that lets choose files; `take(files)` gets them. */
export function chooser(words, take, { many = false, accept = KINDS } = {}) {
  const input = el("input", { type: "file", accept, multiple: many, class: "unseen", "aria-label": words });
  input.addEventListener("change", () => {
    take([...input.files]);
    input.value = "";
  });
  return el("label", { class: "button quiet" }, icon("attach"), el("span", { "aria-hidden": "true" }, words), input);
}

/** What is pasted or dropped on a node. */
export function catches(node, take) {
  node.addEventListener("paste", (event) => {
    const found = pictures(event.clipboardData?.files);
    if (found.length) {
      event.preventDefault();
      take(found);
    }
  });
  node.addEventListener("dragover", (event) => {
    event.preventDefault();
    node.classList.add("over");
  });
  node.addEventListener("dragleave", () => node.classList.remove("over"));
  node.addEventListener("drop", (event) => {
    event.preventDefault();
    node.classList.remove("over");
    const found = pictures(event.dataTransfer?.files);
    if (found.length) take(found);
  });
}
