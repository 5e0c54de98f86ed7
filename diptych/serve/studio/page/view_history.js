// History: everything made here, kept in this browser; look again, download, repeat, or throw away.
import { el, fill, button, announce } from "./dom.js";
import { Refusal } from "./api.js";
import { chooser } from "./files.js";
import { explained } from "./job.js";
import { ofDataUrl, recipeOf } from "./png.js";
import { player } from "./player.js";
import { call, count, showBlob } from "./state.js";
import { LARGEST, MOST, all, clear, drop } from "./store.js";

const WHEN = { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" };
const when = (record) => new Date(record.made).toLocaleString([], WHEN);
const KIND_NAMES = { draw: "Drawing", edit: "Edit", compare: "Comparison", chat: "Conversation" };

export function historyView() {
  const grid = el("ul", { class: "grid" });
  const facts = el("p", { class: "note" });
  const wrong = el("p", { class: "error", role: "alert" });
  const wipe = button("Clear the history", () => sure.showModal(), { class: "quiet" });
  const sure = el("dialog", { "aria-label": "Clear the history" }, el("h2", {}, "Clear the history?"),
    el("p", { class: "note" }, "Everything kept in this browser goes. What was downloaded stays."),
    el("div", { class: "row" }, button("Clear it", async () => {
      await clear();
      sure.close();
      announce("The history is empty");
      show();
    }, { class: "primary danger" }), button("Keep it", () => sure.close(), { class: "quiet" })));
  const detail = el("dialog", { class: "wide" });
  detail.addEventListener("close", () => fill(detail));

  async function show() {
    let records = [];
    try {
      records = await all();
      fill(wrong);
    } catch {
      fill(wrong, "This browser lets the page keep nothing (a private window, perhaps).");
    }
    const bytes = records.reduce((sum, record) => sum + (record.weight ?? 0), 0);
    fill(facts, records.length ? `${count(records.length, "result")}, ${(bytes / 2 ** 20).toFixed(1)} MB, in this `
      + `browser only. The newest ${MOST} or ${LARGEST / 2 ** 20} MB are kept.` : "");
    wipe.hidden = !records.length;
    for (const image of grid.querySelectorAll("img")) URL.revokeObjectURL(image.src);
    fill(grid, records.map(card));
    if (!records.length) {
      fill(grid, el("li", { class: "empty" }, el("p", {}, "Nothing yet. What you draw, edit, compare and talk about is "
        + "kept here, in this browser only.")));
    }
  }

  function card(record) {
    const blobs = record.results?.map((r) => r.image) ?? drawings(record).slice(-2);
    const thumbs = blobs.map((blob) => {
      const image = el("img", { alt: "", class: "pixels" });
      showBlob(image, blob);
      return image;
    });
    const title = record.title || "Untitled";
    return el("li", {}, el("button", { type: "button", class: "card", onclick: () => open_(record) },
      el("span", { class: "thumbs" }, thumbs.length ? thumbs : el("span", { class: "words" }, lastWords(record))),
      el("span", { class: "title" }, title),
      el("span", { class: "facts" }, `${KIND_NAMES[record.kind]} \u00b7 ${when(record)}`)));
  }

  function open_(record) {
    if (record.kind === "chat") {
      call("repeat", record);
      return;
    }
    const players = record.results.map((result, i) => {
      const made = player(KIND_NAMES[record.kind]);
      const request = record.request.sides?.[i] ?? record.request;
      made.finish(record.request.sides ? { ...record, kind: "draw", request } : record, result);
      return made.node;
    });
    const again = button("Repeat the comparison", () => call("repeat", record), { class: "quiet" });
    fill(detail, el("div", { class: "row between" }, el("h2", {}, record.title), button("Close", () => detail.close(),
      { class: "quiet" })), el("div", { class: "panes" }, players), el("div", { class: "row" },
      record.kind === "compare" ? again : null,
      button("Delete", async () => {
        await drop(record.id);
        detail.close();
        announce("Deleted");
        show();
      }, { class: "quiet danger" })));
    detail.setAttribute("aria-label", record.title || "Result");
    detail.showModal();
  }

  /** A file that was downloaded here: the form is filled from its recipe. */
  async function read([file]) {
    try {
      const told = file.type === "image/png" ? await recipeOf(file) : JSON.parse(await file.text());
      if (!told?.kind || !told.request || !(told.kind in KIND_NAMES)) {
        throw new Refusal("This file carries no recipe of the Studio.");
      }
      const inputs = Object.fromEntries(Object.entries(told.inputs ?? {}).map(([part, url]) => [part, ofDataUrl(url)]));
      fill(wrong);
      call("repeat", { ...told, inputs, results: null, messages: [] });
    } catch (error) {
      fill(wrong, error instanceof Refusal ? explained(error) : "This file carries no recipe of the Studio.");
    }
  }

  return {
    name: "history", title: "History",
    node: el("div", {}, el("div", { class: "row wrap between" }, facts, el("div", { class: "row" },
      chooser("Open a recipe", read, { accept: "image/png,application/json,.json" }), wipe)),
    wrong, grid, sure, detail),
    refresh() {},
    open: show,
    leave: () => detail.open && detail.close(),
  };
}

const drawings = (record) => (record.messages ?? []).flatMap((m) => m.parts).map((p) => p.image).filter(Boolean);

const lastWords = (record) => (record.messages ?? []).flatMap((m) => m.parts).map((p) => p.text).filter(Boolean).at(-1)
  ?? "";
