// Inside: who attends to whom in the loaded model, and how much pictures and words agree layer by layer.
import { el, svg, field, fill, choice, button } from "./dom.js";
import { get } from "./api.js";
import { blobOf } from "./png.js";
import { job } from "./job.js";
import { state, modelOf, showBlob } from "./state.js";

const TASK_WORDS = { caption: "describing a picture", draw: "drawing", edit: "editing" };
const KIND_WORDS = { text: "words", feature: "features of a picture", latent: "latents of a picture",
  code: "codes of a picture", query: "learnt tokens", fill: "filling" };

export function insideView() {
  const model = choice([]);
  const task = choice(Object.entries(TASK_WORDS));
  const mask = maskPicture();
  const masks = job("Show the mask", async (signal) => {
    mask.show(await get(`/v1/models/${encodeURIComponent(model.value)}/attention/${task.value}`, signal));
  });
  const chart = el("div", { class: "chart" });
  const layers = job("Compare the layers", async (signal, told) => {
    told("128 pictures with their words, twice");
    fill(chart, ...curves(await get(`/v1/models/${encodeURIComponent(model.value)}/alignment`, signal)));
  });
  const forms = [[masks, el("form", { class: "inline" }, field("In a document that is", task), masks.parts)],
    [layers, el("form", { class: "inline" }, layers.parts)]];
  for (const [work, form] of forms) {
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      work.start();
    });
  }
  const reset = () => {
    mask.clear();
    fill(chart, el("div", { class: "empty" },
      el("p", {}, "Measured on demand, once per model; it takes some seconds.")));
    const draws = modelOf(model.value)?.draws;
    for (const option of task.options) option.disabled = option.value !== "caption" && !draws;
  };
  model.addEventListener("change", reset);
  task.addEventListener("change", () => masks.start());

  return {
    name: "inside", title: "Inside",
    node: el("div", {}, el("div", { class: "narrow" }, field("Model", model)),
      el("section", {}, el("h2", {}, "Who attends to whom"), el("p", { class: "note" }, "Rows ask, columns answer: a "
        + "coloured cell says that the token of its row sees that of its column, in a document as the model is trained "
        + "on it. Point at a row, or use the arrow keys."),
      forms[0][1], mask.node),
      el("section", {}, el("h2", {}, "Do pictures and words agree?"), el("p", { class: "note" }, "For documents of the "
        + "test world: the share of nearest neighbours, by the mean state of a document's picture tokens, that are its "
        + "neighbours by the words too. The more the layers see the same things in both, the higher."),
      forms[1][1], chart)),
    refresh() {
      fill(model, state.models.map((m) => el("option", { value: m.id }, m.id)));
      reset();
    },
  };
}

function maskPicture() {
  const canvas = el("canvas", { tabindex: 0, role: "img", "aria-label": "Attention mask", hidden: true });
  const line = el("span", { class: "rowmark", hidden: true });
  const readout = el("p", { class: "status", role: "status" });
  const legend = el("ul", { class: "legend" });
  const pieces = el("div", { class: "pieces" });
  const empty = el("div", { class: "empty" }, el("p", {}, "Choose a task and show its mask."));
  const node = el("div", { class: "maskview" }, el("div", { class: "maskframe" }, canvas, line, empty),
    el("div", {}, readout, legend, pieces));
  let told = null;
  let kinds = [];
  let bits = null;
  let row = 0;

  const sees = (q, k) => (bits[(q * told.count + k) >> 3] >> (7 - ((q * told.count + k) & 7))) & 1;

  function paint() {
    const cell = Math.max(2, Math.floor(720 / told.count));
    canvas.width = canvas.height = told.count * cell;
    const context = canvas.getContext("2d");
    const shades = Object.fromEntries([...legend.querySelectorAll(".swatch")].map((swatch) => [swatch.dataset.kind,
      getComputedStyle(swatch).backgroundColor]));
    kinds.forEach((kind, k) => {
      context.fillStyle = shades[kind.name];
      for (let q = 0; q < told.count; q += 1) {
        if (sees(q, k)) context.fillRect(k * cell, q * cell, cell - 1, cell - 1);
      }
    });
  }

  function tell(next) {
    row = Math.min(told.count - 1, Math.max(0, next));
    const seen = {};
    for (let k = 0; k < told.count; k += 1) if (sees(row, k)) seen[kinds[k].words] = (seen[kinds[k].words] ?? 0) + 1;
    const list = Object.entries(seen).map(([name, n]) => `${n} of ${name}`).join(", ");
    fill(readout, `Token ${row + 1} of ${told.count} (${kinds[row].words}) sees ${list || "nothing"}.`);
    line.hidden = false;
    line.style.top = `${(100 * row) / told.count}%`;
    line.style.height = `${100 / told.count}%`;
  }

  canvas.addEventListener("pointermove", (event) => {
    const side = canvas.getBoundingClientRect();
    tell(Math.floor(((event.clientY - side.top) / side.height) * told.count));
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowUp: -1, ArrowDown: 1, PageUp: -10, PageDown: 10 }[event.key];
    if (!step) return;
    event.preventDefault();
    tell(row + step);
  });
  window.addEventListener("studio-theme", () => told && paint());

  return {
    node,
    clear() {
      told = null;
      canvas.hidden = line.hidden = true;
      empty.hidden = false;
      for (const part of [readout, legend, pieces]) fill(part);
    },
    show(found) {
      told = found;
      bits = Uint8Array.from(atob(found.mask), (c) => c.charCodeAt(0));
      kinds = found.tokens.flatMap(({ kind, noised, count: n }) => {
        const dim = noised && kind !== "text"; // marks around what is noised are words like others
        return Array(n).fill({ name: dim ? `${kind}-noised` : kind,
          words: `${dim ? "noised " : ""}${KIND_WORDS[kind] ?? kind}` });
      });
      canvas.hidden = false;
      empty.hidden = true;
      canvas.setAttribute("aria-label", `Attention mask of a document that ${found.about}, ${found.count} tokens`);
      const names = new Map(kinds.map((kind) => [kind.name, kind.words]));
      fill(legend, [...names].map(([name, words]) => el("li", {},
        el("span", { class: `swatch ${name}`, "data-kind": name }), words)));
      paint();
      fill(pieces, el("h3", {}, "The document"), found.pieces.map(piece));
      tell(0);
    },
  };
}

function piece({ kind, target, text, b64_json: data }) {
  const role = target ? "answer" : "given";
  if (kind !== "image") return el("p", {}, el("span", { class: "tag" }, role), text ?? kind);
  const image = el("img", { alt: `Picture, ${role}`, class: "pixels" });
  showBlob(image, blobOf(data));
  return el("p", {}, el("span", { class: "tag" }, role), image);
}

const WIDE = 640;
const HIGH = 280;
const PAD = 46;

/** Curves over depth, and the same numbers as a table. */
function curves(found) {
  const good = found.curves.filter((c) => c.values);
  const out = found.curves.filter((c) => c.error).map((c) => el("p", { class: "hint" },
    `When ${TASK_WORDS[c.task]}: not measured. ${c.error}`));
  if (!good.length) return out;
  const depth = Math.max(...good.map((c) => c.values.length)) - 1;
  const x = (i) => PAD + (i / Math.max(1, depth)) * (WIDE - 2 * PAD);
  const y = (v) => HIGH - PAD - v * (HIGH - 2 * PAD);
  const picture = svg("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img",
    "aria-label": "Agreement by layer; the table below has the numbers" });
  for (const v of [0, 0.25, 0.5, 0.75, 1]) {
    picture.append(svg("line", { x1: PAD, x2: WIDE - PAD, y1: y(v), y2: y(v), class: "grid" }),
      svg("text", { x: PAD - 6, y: y(v) + 4, "text-anchor": "end" }, `${v * 100}%`));
  }
  picture.append(svg("line", { x1: PAD, x2: WIDE - PAD, y1: y(found.chance), y2: y(found.chance), class: "chance" }),
    svg("text", { x: WIDE - PAD, y: y(found.chance) - 5, "text-anchor": "end" }, "chance"));
  good.forEach(({ task, values }) => {
    const points = values.map((v, i) => `${x(i)},${y(v)}`).join(" ");
    picture.append(svg("polyline", { points, class: `curve ${task}` }),
      ...values.map((v, i) => svg("circle", { cx: x(i), cy: y(v), r: 3.5, class: `dot ${task}` },
        svg("title", {}, `layer ${i}: ${Math.round(v * 100)}%`))));
  });
  picture.append(svg("text", { x: PAD, y: HIGH - 10 }, "before the first layer"),
    svg("text", { x: WIDE - PAD, y: HIGH - 10, "text-anchor": "end" }, `behind layer ${depth}`));
  const names = el("ul", { class: "legend" }, good.map(({ task }) => el("li", {},
    el("span", { class: `swatch ${task}` }), TASK_WORDS[task])));
  const heads = good.map(({ task }) => el("th", { scope: "col" }, TASK_WORDS[task]));
  const rows = Array.from({ length: depth + 1 }, (_, i) => el("tr", {}, el("th", { scope: "row" }, String(i)),
    good.map(({ values }) => el("td", {}, values[i] === undefined ? "" : `${Math.round(values[i] * 100)}%`))));
  const table = el("details", {}, el("summary", {}, "The numbers"), el("table", {}, el("thead", {}, el("tr", {},
    el("th", { scope: "col" }, "layer"), heads)), el("tbody", {}, rows)));
  return [picture, names, el("p", { class: "hint" }, `${found.documents} documents per task, ${found.neighbours} `
    + "neighbours each."), ...out, table];
}
