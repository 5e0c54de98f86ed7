// Something under way: its button, a button to cancel it, how far it is, and what went wrong, where it happens.
import { el, fill, button, announce } from "./dom.js";
import { Refusal } from "./api.js";

/** `work(signal, told)` does it; `told(words, share)` says how far it is. */
export function job(words, work, properties = {}) {
  let controller = null;
  let timer = 0;
  const go = el("button", { type: "submit", class: "primary", ...properties }, words);
  const stop = button("Cancel", () => controller?.abort(), { class: "quiet", hidden: true });
  const bar = el("progress", { max: 1, "aria-label": words, hidden: true });
  const status = el("p", { class: "status", role: "status" });
  const wrong = el("p", { class: "error", role: "alert" });

  async function start() {
    if (controller) return;
    controller = new AbortController();
    const begun = performance.now();
    const seconds = () => ((performance.now() - begun) / 1000).toFixed(1);
    let said = "Waiting for the model";
    fill(wrong);
    go.disabled = true;
    stop.hidden = bar.hidden = false;
    bar.removeAttribute("value");
    const show = () => fill(status, `${said}, ${seconds()} s`);
    show();
    timer = setInterval(show, 200);
    try {
      await work(controller.signal, (news, share) => {
        said = news;
        if (share !== undefined) bar.value = share;
      }, seconds);
      fill(status, `Done in ${seconds()} s`);
      announce(`${words}: done`);
    } catch (error) {
      fill(status);
      if (error.name === "AbortError") fill(status, "Cancelled");
      else fill(wrong, explained(error));
    } finally {
      clearInterval(timer);
      controller = null;
      go.disabled = false;
      stop.hidden = bar.hidden = true;
    }
  }

  return { start, go, wrong, parts: [el("div", { class: "row" }, go, stop), bar, status, wrong],
    fail: (error) => fill(wrong, explained(error)), get busy() { return controller !== null; } };
}

export function explained(error) {
  if (!(error instanceof Refusal)) return `The page failed: ${error.message}`;
  return error.status === 429 && error.retry ? `The server is busy. Try again in ${error.retry} s.` : error.message;
}
