// Boxes with labels on a sheet: drawn, moved and resized with the mouse or the keys.
import { el, fill, button, fresh, announce } from "./dom.js";

const STEP = 0.02; // of a side, by one press of a key
const LEAST = 0.04;
const NEW = [0.3, 0.3, 0.7, 0.7];

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const rounded = (box) => box.map((v) => Math.round(v * 1000) / 1000);

export function boxEditor() {
  const hint = el("p", { class: "hint", id: fresh("hint") },
    "Drag on the sheet to place a box. Keys: arrows move, Shift and arrows resize, Delete removes.");
  const sheet = el("div", { class: "sheet", role: "group", "aria-label": "Sheet with boxes",
    "aria-describedby": hint.id });
  const list = el("ol", { class: "labels" });
  const adder = button("Add a box", () => add([...NEW], true), { class: "quiet" });
  const node = el("div", { class: "boxes" }, sheet, hint, list, adder);
  let items = []; // {box, node, input}

  const words = (item) => {
    const [x0, y0, x1, y1] = item.box.map((v) => Math.round(v * 100));
    const label = item.input.value || "no label";
    return `Box ${items.indexOf(item) + 1}, ${label}: from ${x0}, ${y0} to ${x1}, ${y1} percent`;
  };

  function place(item) {
    const [x0, y0, x1, y1] = item.box;
    Object.assign(item.node.style, { left: `${x0 * 100}%`, top: `${y0 * 100}%`, width: `${(x1 - x0) * 100}%`,
      height: `${(y1 - y0) * 100}%` });
    item.node.setAttribute("aria-label", words(item));
    fill(item.name, item.input.value || String(items.indexOf(item) + 1));
  }

  const renumber = () => items.forEach((item, i) => {
    place(item);
    item.input.setAttribute("aria-label", `What is in box ${i + 1}`);
  });

  function add(box, focus = false, label = "") {
    const grip = el("span", { class: "grip" });
    const name = el("span", { class: "name" });
    const input = el("input", { type: "text", maxlength: 200, placeholder: "such as: red circle", value: label });
    const item = { box, input, name, node: el("button", { type: "button", class: "box" }, name, grip) };
    input.value = label;
    item.row = el("li", {}, input, button("Remove", () => remove(item), { class: "quiet" }));
    items.push(item);
    sheet.append(item.node);
    list.append(item.row);
    input.addEventListener("input", () => place(item));
    item.node.addEventListener("keydown", (event) => pressed(event, item));
    item.node.addEventListener("pointerdown", (event) => grab(event, item, event.target === grip));
    renumber();
    if (focus) item.input.focus();
    return item;
  }

  function remove(item) {
    const at = items.indexOf(item);
    items = items.filter((other) => other !== item);
    item.node.remove();
    item.row.remove();
    renumber();
    announce("Box removed");
    (items[Math.min(at, items.length - 1)]?.node ?? adder).focus();
  }

  function move(item, dx, dy) {
    const [x0, y0, x1, y1] = item.box;
    const x = clamp(dx, -x0, 1 - x1);
    const y = clamp(dy, -y0, 1 - y1);
    item.box = [x0 + x, y0 + y, x1 + x, y1 + y];
    place(item);
  }

  function resize(item, dx, dy) {
    const [x0, y0, x1, y1] = item.box;
    item.box = [x0, y0, clamp(x1 + dx, x0 + LEAST, 1), clamp(y1 + dy, y0 + LEAST, 1)];
    place(item);
  }

  function pressed(event, item) {
    const way = { ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP] }[event.key];
    if (way) {
      (event.shiftKey ? resize : move)(item, ...way);
    } else if (event.key === "Delete" || event.key === "Backspace") {
      remove(item);
    } else if (event.key === "Enter") {
      item.input.focus();
    } else {
      return;
    }
    event.preventDefault();
  }

  /** Follows the pointer until it is let go; distances are shares of the sheet. */
  function follow(event, step, done = () => {}) {
    const side = sheet.getBoundingClientRect();
    let last = [event.clientX, event.clientY];
    const moved = (now) => {
      step((now.clientX - last[0]) / side.width, (now.clientY - last[1]) / side.height);
      last = [now.clientX, now.clientY];
    };
    const up = () => {
      window.removeEventListener("pointermove", moved);
      window.removeEventListener("pointerup", up);
      window.removeEventListener("pointercancel", up);
      done();
    };
    window.addEventListener("pointermove", moved);
    window.addEventListener("pointerup", up);
    window.addEventListener("pointercancel", up);
  }

  function grab(event, item, corner) {
    event.stopPropagation();
    event.preventDefault();
    item.node.focus();
    follow(event, (dx, dy) => (corner ? resize : move)(item, dx, dy));
  }

  sheet.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    const side = sheet.getBoundingClientRect();
    const start = [(event.clientX - side.left) / side.width, (event.clientY - side.top) / side.height];
    let end = [...start];
    let item = null;
    follow(event, (dx, dy) => {
      end = [clamp(end[0] + dx, 0, 1), clamp(end[1] + dy, 0, 1)];
      const box = [Math.min(start[0], end[0]), Math.min(start[1], end[1]), Math.max(start[0], end[0]),
        Math.max(start[1], end[1])];
      if (!item && (box[2] - box[0] < LEAST || box[3] - box[1] < LEAST)) return;
      item ??= add(box);
      item.box = [box[0], box[1], Math.max(box[2], box[0] + LEAST), Math.max(box[3], box[1] + LEAST)];
      place(item);
    }, () => item?.input.focus());
  });

  return {
    node,
    /** As the server takes them; a box without a label is an error in words. */
    values() {
      const bare = items.find((item) => !item.input.value.trim());
      if (bare) {
        bare.input.focus();
        throw new Error(`say what is in box ${items.indexOf(bare) + 1}`);
      }
      return items.map((item) => ({ label: item.input.value.trim(), box: rounded(item.box) }));
    },
    load(boxes) {
      for (const item of items) item.node.remove(), item.row.remove();
      items = [];
      for (const { label, box } of boxes) add([...box], false, label);
    },
    get size() { return items.length; },
  };
}
