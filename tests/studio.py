"""What the tests of the Studio share: three tiny models of three families on a real server, and one real browser."""
import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import browser
import torch
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page, sync_playwright

from diptych.objectives.next_token import TextSampling
from diptych.serve import Settings, create_app
from diptych.serve.run import running
from diptych.systems.janus import Janus
from diptych.systems.show_o import ShowO
from tests.serving import tiny

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
PATIENCE = 30_000  # milliseconds: a busy machine is slow
VIEWS = ("Chat", "Draw", "Edit", "Compare", "Inside", "Ledger", "History")


def family(kind: Callable[..., Any], steps: int) -> Any:
    """A tiny model of random weights that says few words."""
    config = kind.tiny()  # type: ignore[attr-defined]
    sampling = dataclasses.replace(config.sampling, evaluations=steps, text=TextSampling(max_tokens=5))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(dataclasses.replace(config, sampling=sampling)).eval()


@contextlib.contextmanager
def served(**how: Any) -> Iterator[Any]:
    """A server with a model that draws by flow, by masked tokens, and code by code."""
    logging.getLogger("diptych.serve").setLevel(logging.ERROR)
    models = {"flow": tiny(tokens=5, steps=6), "masked": family(ShowO, 5), "raster": family(Janus, 5)}
    with running(create_app(models, Settings(slots=4), **how)) as server:
        yield server


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=browser.BINARY, args=FLAGS)
        try:
            yield opened
        finally:
            opened.close()


class Studio:
    """A page of its own storage. `wrong`: what the console and the page complained about."""

    def __init__(self, opened: Browser, address: str, **how: Any) -> None:
        self.context = opened.new_context(**{"viewport": {"width": 1200, "height": 900}, **how})
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.wrong: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda m: self.wrong.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.address = address
        self.page.goto(address)
        self.page.locator("#models li").first.wait_for(state="attached")

    def view(self, name: str) -> Locator:
        """Chosen by its tab."""
        self.page.get_by_role("tab", name=name).click()
        return self.page.locator(f"#view-{name.lower()}")

    def done(self, view: Locator) -> None:
        view.get_by_text("Done in").wait_for()

    def draw(self, words: str = "a red circle", model: str = "flow", seed: int = 7) -> Locator:
        view = self.view("Draw")
        view.get_by_label("What to draw").fill(words)
        self.choose(view, model, seed)
        view.get_by_role("button", name="Draw", exact=True).click()
        self.done(view)
        return view

    def choose(self, view: Locator, model: str, seed: int) -> None:
        view.get_by_label("Model", exact=True).select_option(model)
        view.locator("details").first.evaluate("d => { d.open = true }")
        view.get_by_label("Seed", exact=True).fill(str(seed))

    def drag(self, on: Locator, start: tuple[float, float], end: tuple[float, float]) -> None:
        """With the mouse; places are shares of the sides."""
        on.scroll_into_view_if_needed()
        box = on.bounding_box()
        assert box is not None
        (x0, y0), (x1, y1) = ((box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end))
        self.page.mouse.move(x0, y0)
        self.page.mouse.down()
        self.page.mouse.move(x1, y1, steps=5)
        self.page.mouse.up()

    def painted(self, picture: Locator) -> str:
        """The pixels of a picture, as it came."""
        return picture.evaluate("""async (picture) => {
            await picture.decode();
            const sheet = new OffscreenCanvas(picture.naturalWidth, picture.naturalHeight);
            sheet.getContext("2d").drawImage(picture, 0, 0);
            return sheet.getContext("2d").getImageData(0, 0, sheet.width, sheet.height).data.join();
        }""")

    def download(self, click: Locator) -> bytes:
        with self.page.expect_download() as caught:
            click.click()
        return caught.value.path().read_bytes()

    def complaints(self) -> list[str]:
        """Of axe-core about what is shown: rule and first place."""
        self.page.evaluate(Axe().axe_script)
        found = self.page.evaluate("axe.run(document, {resultTypes: ['violations'], iframes: false})")
        return [f"{v['id']}: {v['nodes'][0]['html'][:160]} {v['nodes'][0].get('failureSummary', '')[:200]}"
                for v in found["violations"]]

    def close(self) -> None:
        self.context.close()


def recipe_of(png: bytes) -> dict[str, Any]:
    """What a downloaded picture carries."""
    import io

    from PIL import Image

    return json.loads(Image.open(io.BytesIO(png)).text["diptych"])  # type: ignore[attr-defined]
