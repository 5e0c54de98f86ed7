// Making elements. Whatever comes from people or models becomes a text node; there is no other way in here.

/** el("button", {class: "quiet", onclick: go}, "Go"): names that begin with `on` are listeners, false leaves away. */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  assign(made, properties);
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

export function svg(tag, properties = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  assign(made, properties);
  made.append(...children);
  return made;
}

function assign(made, properties) {
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
}

/** In place of what is there. */
export function fill(node, ...children) {
  node.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

let numbers = 0;
export const fresh = (name) => `${name}-${(numbers += 1)}`;

/** A control with its label above; `hint` is read out with it. */
export function field(label, control, hint = "") {
  control.id = control.id || fresh("field");
  const parts = [el("label", { for: control.id }, label), control];
  if (hint) {
    const about = el("p", { class: "hint", id: fresh("hint") }, hint);
    control.setAttribute("aria-describedby", about.id);
    parts.push(about);
  }
  return el("div", { class: "field" }, parts);
}

/** A select; options are [value, words]. */
export function choice(options, properties = {}) {
  return el("select", properties, options.map(([value, words]) => el("option", { value }, words)));
}

export function button(words, onclick, properties = {}) {
  return el("button", { type: "button", onclick, ...properties }, words);
}

/** A toggle: calls with the new state. */
export function toggle(words, change, on = false) {
  const made = button(words, () => {
    const pressed = made.getAttribute("aria-pressed") !== "true";
    made.setAttribute("aria-pressed", pressed);
    change(pressed);
  }, { class: "quiet", "aria-pressed": String(on) });
  return made;
}

/** Icons are drawn, 20 units wide. */
const ICONS = {
  chat: "M3 4h14v9H9l-4 3.5V13H3z",
  draw: "M4 16l1-4 8.5-8.5 3 3L8 15z M12 5l3 3",
  edit: "M3 4h14v12H3z M6 12l3-3 2 2 3-4",
  compare: "M3 4h6v12H3z M11 4h6v12h-6z",
  inside: "M3 3h14v14H3z M3 8h14 M8 3v14 M12.5 8v9",
  ledger: "M4 3h12v14H4z M7 7h6 M7 10h6 M7 13h4",
  history: "M10 4a6 6 0 1 1-5.6 3.9 M4 4v4h4 M10 7v3.5l2.5 1.5",
  theme: "M10 3a7 7 0 1 0 7 7 5 5 0 0 1-7-7z",
  attach: "M13.5 6.5L8 12a2 2 0 1 0 3 3l5.5-5.5a3.6 3.6 0 0 0-5-5L6 10a5.2 5.2 0 0 0 7.4 7.4",
  play: "M6 4l10 6-10 6z",
  dice: "M4 4h12v12H4z M7.5 7.5h.01 M12.5 12.5h.01 M10 10h.01 M12.5 7.5h.01 M7.5 12.5h.01",
};

export function icon(name) {
  return svg("svg", { viewBox: "0 0 20 20", class: "icon", "aria-hidden": "true" }, svg("path", { d: ICONS[name] }));
}

/** Tell those who listen rather than look. */
export function announce(words) {
  document.getElementById("announcer").textContent = words;
}
