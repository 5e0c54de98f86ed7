// The page: views behind tabs, light and dark, and the models of the server.
import { el, fill, icon } from "./dom.js";
import { get } from "./api.js";
import { explained } from "./job.js";
import { on, state } from "./state.js";
import { chatView } from "./view_chat.js";
import { compareView } from "./view_compare.js";
import { drawView } from "./view_draw.js";
import { editView } from "./view_edit.js";
import { historyView } from "./view_history.js";
import { insideView } from "./view_inside.js";

const THEMES = ["auto", "light", "dark"];
const THEME = "diptych-theme";

function ledgerView() {
  const frame = el("iframe", { title: "The ledger", class: "ledger" });
  return { name: "ledger", title: "Ledger", node: el("div", { class: "fill" }, frame), refresh() {},
    open: () => frame.getAttribute("src") ?? frame.setAttribute("src", "/ledger") };
}

const views = [chatView(), drawView(), editView(), compareView(), insideView(), ledgerView(), historyView()];
const tabs = new Map();

function select(name, focus = false) {
  for (const view of views) {
    const [tab, panel] = tabs.get(view.name);
    const chosen = view.name === name;
    if (!chosen && !panel.hidden) view.leave?.();
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
    panel.hidden = !chosen;
    if (chosen) {
      if (focus) tab.focus();
      tab.scrollIntoView({ block: "nearest", inline: "center" });
      if (view.name === "ledger" || view.name === "history") view.open();
      document.title = `${view.title} \u00b7 Diptych Studio`;
      if (location.hash !== `#${name}`) history.replaceState(null, "", `#${name}`);
    }
  }
}

function build() {
  const list = document.getElementById("tabs");
  const panels = document.getElementById("panels");
  for (const view of views) {
    const tab = el("button", { type: "button", role: "tab", id: `tab-${view.name}`,
      "aria-controls": `view-${view.name}`, onclick: () => select(view.name) },
    icon(view.name), el("span", {}, view.title));
    const panel = el("section", { role: "tabpanel", id: `view-${view.name}`, "aria-labelledby": tab.id, hidden: true },
      el("h1", {}, view.title), view.node);
    tabs.set(view.name, [tab, panel]);
    list.append(tab);
    panels.append(panel);
  }
  list.addEventListener("keydown", (event) => {
    const place = views.findIndex((view) => tabs.get(view.name)[0] === document.activeElement);
    const next = { ArrowRight: place + 1, ArrowDown: place + 1, ArrowLeft: place - 1, ArrowUp: place - 1, Home: 0,
      End: views.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    select(views[(next + views.length) % views.length].name, true);
  });
  window.addEventListener("hashchange", () => wanted());
}

function wanted() {
  const name = location.hash.slice(1);
  select(tabs.has(name) ? name : views[1].name);
}

function theme() {
  const made = document.getElementById("theme");
  made.prepend(icon("theme"));
  const set = (name) => {
    document.documentElement.dataset.theme = name;
    made.lastElementChild.textContent = { auto: "Auto", light: "Light", dark: "Dark" }[name];
    made.setAttribute("aria-label", `Colours: ${name}. Change`);
    window.dispatchEvent(new Event("studio-theme"));
  };
  set(THEMES.includes(localStorage.getItem(THEME)) ? localStorage.getItem(THEME) : "auto");
  made.addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
    localStorage.setItem(THEME, next);
    set(next);
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change",
    () => window.dispatchEvent(new Event("studio-theme")));
}

async function start() {
  const banner = document.getElementById("banner");
  try {
    const { data } = await get("/v1/models");
    state.models = data;
    fill(document.getElementById("models"), data.map((m) => el("li", {}, el("b", {}, m.id),
      `${m.title ?? m.system}, ${(m.parameters / 1e6).toPrecision(3)}M`)));
    for (const view of views) view.refresh();
  } catch (error) {
    fill(banner, explained(error));
  }
}

const named = (name) => views.find((view) => view.name === name);
on("repeat", (record) => {
  select(record.kind);
  named(record.kind).repeat(record);
});
on("edit", (blob) => {
  select("edit");
  named("edit").open(blob);
});
on("attach", (blob) => {
  select("chat");
  named("chat").attach(blob);
});

build();
theme();
wanted();
start();
