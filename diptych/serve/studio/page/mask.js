// A mask painted over a picture: what is painted may change, the rest stays as it is.
import { el, field, button, toggle, announce } from "./dom.js";

const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const PAINT = "#d6249f";
const WIDEST = 2048; // pixels of a side that are painted on

/** `more` are further buttons for its tools. */
export function maskPainter(...more) {
  const picture = el("canvas", { class: "under", "aria-hidden": "true" });
  const canvas = el("canvas", { class: "over", tabindex: 0, role: "application",
    "aria-label": "Mask over the picture. Arrow keys move the brush, Space paints, E erases." });
  const brush = el("span", { class: "brush", hidden: true });
  const stage = el("div", { class: "painter" }, picture, canvas, brush);
  const size = el("input", { type: "range", min: 2, max: 50, value: 16 });
  const eraser = toggle("Erase", (on) => { erasing = on; });
  const tools = el("div", { class: "row wrap tools" }, field("Brush", size), eraser,
    button("Clear", () => wipe(), { class: "quiet" }), button("Invert", () => invert(), { class: "quiet" }), more);
  const node = el("div", { hidden: true }, stage, tools);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  let erasing = false;
  let painted = false;
  let last = null;
  let at = [0.5, 0.5]; // of the brush, as shares of the sides

  const radius = () => (size.value / 200) * Math.min(canvas.width, canvas.height);

  function stroke(to, erase = erasing) {
    const from = last ?? to;
    context.globalCompositeOperation = erase ? "destination-out" : "source-over";
    context.strokeStyle = context.fillStyle = PAINT;
    context.lineWidth = 2 * radius();
    context.lineCap = "round";
    context.beginPath();
    context.moveTo(from[0] * canvas.width, from[1] * canvas.height);
    context.lineTo(to[0] * canvas.width + 0.01, to[1] * canvas.height);
    context.stroke();
    last = to;
    painted = true;
  }

  function hover(to) {
    at = to;
    const side = canvas.getBoundingClientRect();
    const wide = (size.value / 100) * Math.min(side.width, side.height);
    Object.assign(brush.style, { left: `${to[0] * 100}%`, top: `${to[1] * 100}%`, width: `${wide}px`,
      height: `${wide}px` });
    brush.hidden = false;
  }

  const placeOf = (event) => {
    const side = canvas.getBoundingClientRect();
    return [(event.clientX - side.left) / side.width, (event.clientY - side.top) / side.height];
  };

  canvas.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    canvas.focus();
    canvas.setPointerCapture(event.pointerId);
    last = null;
    hover(placeOf(event));
    stroke(placeOf(event));
  });
  canvas.addEventListener("pointermove", (event) => {
    hover(placeOf(event));
    if (canvas.hasPointerCapture(event.pointerId)) stroke(placeOf(event));
  });
  canvas.addEventListener("pointerleave", () => { brush.hidden = true; });
  canvas.addEventListener("blur", () => { brush.hidden = true; });
  canvas.addEventListener("keydown", (event) => {
    const way = KEYS[event.key];
    if (way) {
      hover(at.map((v, i) => Math.min(1, Math.max(0, v + way[i] * 0.03))));
    } else if (event.key === " " || event.key === "e") {
      last = null;
      hover(at);
      stroke(at, event.key === "e" || erasing);
      announce(`${event.key === "e" || erasing ? "Erased" : "Painted"} at ${Math.round(at[0] * 100)}, ${
        Math.round(at[1] * 100)} percent`);
    } else {
      return;
    }
    event.preventDefault();
  });

  function wipe() {
    context.clearRect(0, 0, canvas.width, canvas.height);
    painted = false;
  }

  function invert() {
    context.globalCompositeOperation = "source-out";
    context.fillStyle = PAINT;
    context.fillRect(0, 0, canvas.width, canvas.height);
    painted = true;
  }

  return {
    node,
    /** Another picture below; resolves to it as a PNG of the size that is painted on. */
    async show(blob) {
      const bitmap = await createImageBitmap(blob);
      const shrink = Math.min(1, WIDEST / Math.max(bitmap.width, bitmap.height));
      for (const sheet of [picture, canvas]) {
        sheet.width = Math.max(1, Math.round(bitmap.width * shrink));
        sheet.height = Math.max(1, Math.round(bitmap.height * shrink));
      }
      picture.getContext("2d").drawImage(bitmap, 0, 0, picture.width, picture.height);
      stage.classList.toggle("pixels", Math.max(picture.width, picture.height) < 320);
      stage.style.aspectRatio = `${picture.width} / ${picture.height}`;
      painted = false;
      node.hidden = false;
      return new Promise((resolve) => { picture.toBlob(resolve, "image/png"); });
    },
    hide() { node.hidden = true; },
    /** Where the picture may change, transparent there, as the server takes it; null if nothing is painted. */
    async blob() {
      const drawn = context.getImageData(0, 0, canvas.width, canvas.height);
      let some = false;
      for (let i = 0; i < drawn.data.length; i += 4) {
        const free = drawn.data[i + 3] > 127;
        some ||= free;
        drawn.data.fill(0, i, i + 3);
        drawn.data[i + 3] = free ? 0 : 255;
      }
      if (!painted || !some) return null;
      const sheet = el("canvas", { width: canvas.width, height: canvas.height });
      sheet.getContext("2d").putImageData(drawn, 0, 0);
      return new Promise((resolve) => { sheet.toBlob(resolve, "image/png"); });
    },
    /** A mask that was kept. */
    async load(blob) {
      const bitmap = await createImageBitmap(blob);
      wipe();
      context.globalCompositeOperation = "source-over";
      context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
      invert();
    },
  };
}
