"""The Studio in a real browser, on a real server with three tiny models: clicks, keys, paint, boxes, steps, reloads."""
import io
import re
import time
from collections.abc import Iterator
from pathlib import Path

import browser
import httpx
import numpy as np
import pytest
from PIL import Image as Pil
from playwright.sync_api import Browser, expect

from diptych.engine import Engine
from diptych.serve import Settings
from diptych.serve.auth import Keys
from diptych.serve.studio import assemble
from tests.serving import Local, make, pixels, png
from tests.studio import PATIENCE, VIEWS, Studio, chromium, recipe_of, served

pytestmark = pytest.mark.skipif(browser.BINARY is None, reason="needs Chromium")
KEY = "a-key-of-some-length"
expect.set_options(timeout=20_000)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served() as server:
        yield server.address


@pytest.fixture(scope="module")
def opened() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def studio(opened: Browser, address: str) -> Iterator[Studio]:
    """A page of its own storage, which must not complain."""
    studio = Studio(opened, address)
    yield studio
    studio.close()
    assert not studio.wrong
    assert all(url.startswith((address, "blob:", "data:")) for url in studio.asked), "nothing comes from elsewhere"


# -- the document -----------------------------------------------------------------------------------------------------

def test_one_document_under_strict_rules() -> None:
    with Local(make()) as local:
        answer = local.get("/")
        rules = answer.headers["content-security-policy"]
        assert "default-src 'none'" in rules and "frame-ancestors 'none'" in rules and "unsafe" not in rules
        assert "require-trusted-types-for 'script'" in rules and rules.count("'sha256-") == 2
        assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "no-referrer"
        outside = set(re.findall(r"https?://[\w./-]+", answer.text)) - {"http://www.w3.org/2000/svg"}
        assert not outside and " src=" not in answer.text and " style=" not in answer.text
        ledger = local.get("/ledger")
        assert "frame-ancestors 'self'" in ledger.headers["content-security-policy"]
        assert "script-src 'sha256-" in ledger.headers["content-security-policy"]
    with Local(make(Settings(studio=False))) as local:
        assert local.get("/").status_code == local.get("/ledger").status_code == 404


def test_no_text_ever_becomes_markup() -> None:
    for name in assemble.modules():
        source = (assemble.PAGE / name).read_text(encoding="utf-8")
        assert source.isascii() and source.count("\n") <= 250 and max(map(len, source.split("\n"))) <= 120, name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|srcdoc", source)
    assert set(assemble.modules()) == {p.name for p in assemble.PAGE.glob("*.js")}, "every file is on the page"
    defined = r"(?:async )?(?:function\*?|const|let|class) (\w+)"
    names = re.findall(f"^{defined}", assemble.joined(), re.MULTILINE)
    assert len(names) == len(set(names)), "one scope: no name twice"
    for name in assemble.modules():
        source = (assemble.PAGE / name).read_text()
        for wanted, file in re.findall(r'^import \{(.*)\} from "\./(.*)";', source, re.MULTILINE):
            given = re.findall(f"^export {defined}", (assemble.PAGE / file).read_text(), re.MULTILINE)
            assert set(wanted.replace(" ", "").split(",")) <= set(given), f"{name}: what {file} does not give"


# -- drawing ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("model", "frames", "told", "cells"), [
    ("flow", 6, r"step 1 of 6, time 0\.00", False), ("masked", 5, r"step 1 of 5, \d+% settled", True),
    ("raster", 64, r"step 1 of 64, 2% settled", True)])
def test_every_family_can_be_stepped_through(studio: Studio, model: str, frames: int, told: str, cells: bool) -> None:
    view = studio.draw(model=model)
    slider, where = view.get_by_role("slider", name="Step of drawing"), view.locator(".where")
    expect(where).to_have_text("finished")
    assert slider.get_attribute("max") == str(frames)
    last = studio.painted(view.get_by_role("img", name="finished"))
    slider.fill("1")
    expect(where).to_have_text(re.compile(told))
    shaded = view.locator(".cells rect").count()
    assert studio.painted(view.get_by_role("img", name="step 1")) != last
    assert (shaded > 0) == cells
    slider.press("ArrowRight")
    expect(where).to_have_text(re.compile("step 2 of"))
    assert view.locator(".cells rect").count() < shaded or not cells, "cells settle"
    slider.press("End")
    assert studio.painted(view.get_by_role("img", name="finished")) == last
    assert view.locator(".cells rect").count() == 0


def test_a_download_carries_what_repeats_it(studio: Studio, address: str, tmp_path: Path) -> None:
    view = studio.draw("a \u201cred\u201d circle <b>", seed=11)
    data = studio.download(view.get_by_role("button", name="Download", exact=True))
    told = recipe_of(data)
    assert told["kind"] == "draw" and told["request"]["seed"] == told["recipe"]["seed"] == 11
    assert told["request"]["prompt"] == "a \u201cred\u201d circle <b>"
    again = httpx.post(f"{address}/v1/images/generations", json=told["request"], timeout=60).json()
    assert np.array_equal(np.asarray(Pil.open(io.BytesIO(data))), pixels(again["data"][0]["b64_json"]))
    file = tmp_path / "made.png"
    file.write_bytes(data)
    studio.draw("something else", seed=3)
    history = studio.view("History")
    history.get_by_label("Open a recipe").set_input_files(file)
    expect(view.get_by_label("What to draw")).to_have_value("a \u201cred\u201d circle <b>")
    expect(view.get_by_label("Seed", exact=True)).to_have_value("11")
    studio.view("History").get_by_label("Open a recipe").set_input_files({
        "name": "x.png", "mimeType": "image/png", "buffer": png()})
    expect(history.get_by_role("alert").first).to_have_text(re.compile("carries no recipe"))


def test_boxes_with_the_mouse_and_the_keys(studio: Studio) -> None:
    view = studio.view("Draw")
    view.get_by_role("button", name="Place boxes").click()
    sheet = view.get_by_role("group", name="Sheet with boxes")
    studio.drag(sheet, (0.1, 0.1), (0.5, 0.5))
    studio.page.keyboard.type("red circle")
    first = view.get_by_role("button", name=re.compile("Box 1, red circle: from 10, 10 to 50, 50"))
    studio.drag(first.locator(".grip"), (0.5, 0.5), (0.5, 25))
    expect(view.get_by_role("button", name=re.compile("Box 1, .* to 50, 100"))).to_be_visible()
    studio.drag(first.or_(view.locator(".box").first), (0.5, 0.3), (0.75, 0.3))
    expect(view.get_by_role("button", name=re.compile("Box 1, .*: from 20, 10 to 60, 100"))).to_be_visible()
    view.get_by_role("button", name="Add a box").click()
    studio.page.keyboard.type("blue square")
    second = view.locator(".box").nth(1)
    second.focus()
    for key in ("ArrowLeft", "ArrowDown", "ArrowDown", "Shift+ArrowRight"):
        studio.page.keyboard.press(key)
    expect(second).to_have_attribute("aria-label", "Box 2, blue square: from 28, 34 to 70, 74 percent")
    view.get_by_role("button", name="Add a box").click()
    view.get_by_role("button", name="Draw", exact=True).click()
    expect(view.get_by_role("alert").first).to_have_text("A box has no label: say what is in box 3.")
    view.locator(".box").nth(2).focus()
    studio.page.keyboard.press("Delete")
    expect(view.locator(".box")).to_have_count(2)
    studio.choose(view, "flow", 5)
    view.get_by_role("button", name="Draw", exact=True).click()
    studio.done(view)
    told = recipe_of(studio.download(view.get_by_role("button", name="Download", exact=True)))
    assert told["request"]["boxes"][1] == {"label": "blue square", "box": [0.28, 0.34, 0.7, 0.74]}
    assert told["recipe"]["task"] == "layout"


# -- editing and talking ----------------------------------------------------------------------------------------------

def test_an_edit_changes_what_was_painted(studio: Studio) -> None:
    view = studio.view("Edit")
    view.get_by_role("button", name="Change it").click()
    expect(view.get_by_role("alert").first).to_have_text("Choose a picture to change first.")
    view.get_by_label("Choose a picture").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": png()})
    canvas = view.get_by_role("application")
    studio.drag(canvas, (0.25, 0.25), (0.5, 0.25))
    view.get_by_label("What shall change").fill("make it red")
    studio.choose(view, "flow", 2)
    view.get_by_role("button", name="Change it").click()
    studio.done(view)
    data = studio.download(view.get_by_role("button", name="Download", exact=True))
    made, before = np.asarray(Pil.open(io.BytesIO(data))), np.asarray(Pil.open(io.BytesIO(png())))
    same = (made == before).all(-1)
    assert same[32:].all() and same[:, 48:].all(), "outside the paint it is as it was"
    assert not same[12:20, 18:30].any(), "where it was painted it is not"
    told = recipe_of(data)
    assert set(told["inputs"]) == {"image", "mask"} and told["recipe"]["mask"] == "composite"
    view.get_by_role("button", name="Clear").click()
    canvas.focus()
    for key in ("ArrowUp", "Space"):
        studio.page.keyboard.press(key)
    expect(studio.page.locator("#announcer")).to_have_text("Painted at 50, 22 percent")


def test_a_conversation_with_pictures_goes_on_after_a_reload(studio: Studio) -> None:
    view = studio.view("Chat")
    view.get_by_label("Attach pictures").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": png()})
    expect(view.get_by_role("img", name="Picture 1 to send")).to_be_visible()
    studio.choose(view, "flow", 1)
    view.get_by_label("Answer with").select_option("text,image")
    view.get_by_label("Message").fill("what is this ? <img src=x>")
    studio.page.keyboard.press("Enter")
    studio.done(view)
    message = view.locator(".message.assistant")
    assert message.locator(".said").inner_text().strip()
    told = recipe_of(studio.download(message.get_by_role("button", name="Download")))
    assert told["request"]["messages"][0]["words"] == "what is this ? <img src=x>" and told["recipe"]["seed"] == 1
    said = view.locator(".log").inner_text()
    studio.page.reload()
    expect(view.locator(".message")).to_have_count(2)
    assert view.locator(".log").inner_text() == said
    view.get_by_label("Message").fill("and now ?")
    view.get_by_role("button", name="Send").click()
    studio.done(view)
    expect(view.locator(".message")).to_have_count(4)
    view.get_by_role("button", name="New conversation").click()
    expect(view.locator(".message")).to_have_count(0)
    assert "Conversation" in studio.view("History").locator(".card").inner_text()


# -- side by side, inside, what was made ------------------------------------------------------------------------------

def test_two_models_side_by_side(studio: Studio) -> None:
    view = studio.view("Compare")
    view.get_by_label("What both shall draw").fill("a star")
    view.get_by_role("button", name="Compare", exact=True).click()
    studio.done(view)
    facts = view.locator(".player > .facts").all_inner_texts()
    seeds = {re.search(r"seed (\d+)", f)[1] for f in facts}  # type: ignore[index]
    assert facts[0].startswith("flow") and facts[1].startswith("masked") and len(seeds) == 1
    view.get_by_role("slider", name="Step of left picture").fill("1")
    expect(view.locator(".where").nth(1)).to_have_text(re.compile("step 1 of 5"))
    studio.page.reload()
    history = studio.view("History")
    history.locator(".card").click()
    expect(history.get_by_role("dialog").locator("img:visible")).to_have_count(2)
    history.get_by_role("button", name="Repeat the comparison").click()
    expect(view.get_by_label("What both shall draw")).to_have_value("a star")


def test_masks_and_layers_of_the_loaded_model(studio: Studio) -> None:
    view = studio.view("Inside")
    view.get_by_label("In a document").select_option("draw")
    canvas = view.get_by_role("img", name=re.compile("Attention mask of a document that draws"))
    status = view.get_by_role("status").filter(has_text="sees")
    expect(status).to_have_text(re.compile(r"Token 1 of \d+ \(words\) sees \d+ of words"))
    shades = canvas.evaluate("c => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height)"
                             ".data.buffer)).size")
    assert shades >= 3, "nothing, words, latents"
    canvas.focus()
    for _ in range(20):
        canvas.press("ArrowDown")
    expect(status).to_have_text(re.compile(r"Token 21 of \d+ \(noised latents of a picture\) sees"))
    view.get_by_role("button", name="Compare the layers").click()
    chart = view.locator(".chart")
    expect(chart.locator("polyline")).to_have_count(2)
    chart.get_by_text("The numbers").click()
    assert re.search(r"0\s+\d+%\s+\d+%", chart.get_by_role("table").inner_text())


def test_the_ledger_is_there(studio: Studio) -> None:
    studio.view("Ledger")
    frame = studio.page.frame_locator("iframe")
    expect(frame.get_by_role("heading", name="The ledger", exact=True)).to_be_visible()
    frame.get_by_role("button", name="flow", exact=True).first.click()
    expect(frame.locator("#system-janus")).to_be_hidden()


def test_history_survives_and_can_be_cleared(studio: Studio) -> None:
    studio.draw("the first", seed=21)
    studio.draw("the second", seed=22)
    studio.page.reload()
    view = studio.view("History")
    expect(view.locator(".card .title")).to_have_text(["the second", "the first"])
    view.locator(".card").last.click()
    dialog = view.get_by_role("dialog")
    expect(dialog.get_by_role("slider")).to_have_attribute("max", "6")
    dialog.get_by_role("button", name="Repeat").click()
    draw = studio.page.locator("#view-draw")
    expect(draw.get_by_label("What to draw")).to_have_value("the first")
    view = studio.view("History")
    view.locator(".card").first.click()
    view.get_by_role("button", name="Delete").click()
    expect(view.locator(".card")).to_have_count(1)
    view.get_by_role("button", name="Clear the history").click()
    view.get_by_role("button", name="Clear it").click()
    expect(view.locator(".card")).to_have_count(0)
    expect(view.get_by_text("Nothing yet.")).to_be_visible()


# -- what goes wrong --------------------------------------------------------------------------------------------------

def test_cancelling_frees_the_slot(studio: Studio, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine: (time.sleep(0.05), step(engine))[1])  # or it is done before
    view = studio.view("Draw")
    view.get_by_label("What to draw").fill("a star")
    studio.choose(view, "flow", 1)
    view.get_by_label("Steps", exact=True).fill("250")
    view.get_by_role("button", name="Draw", exact=True).click()
    expect(view.get_by_role("status").first).to_have_text(re.compile("Step"))
    view.get_by_role("button", name="Cancel").click()
    expect(view.get_by_role("status").first).to_have_text("Cancelled")
    for _ in range(200):
        if 'diptych_running{model="flow"} 0.0' in httpx.get(f"{address}/metrics", timeout=60).text:
            break
        studio.page.wait_for_timeout(50)
    else:
        pytest.fail("expected the slot to be free")
    expect(view.get_by_text("Say what to draw, or place boxes, and watch")).to_be_visible()


def test_errors_are_said_where_they_happen(studio: Studio) -> None:
    view = studio.view("Draw")
    view.get_by_role("button", name="Draw", exact=True).click()
    expect(view.get_by_role("alert").first).to_have_text("Say what to draw, or place boxes with labels.")
    view.get_by_label("What to draw").fill("a star")
    studio.choose(view, "flow", 1)
    view.get_by_label("Size").fill("63x64")
    view.get_by_role("button", name="Draw", exact=True).click()
    expect(view.get_by_role("alert").first).to_have_text(re.compile("expected a size in multiples of 16"))
    assert any("400" in told for told in studio.wrong), "the browser itself notes the status"
    studio.wrong.clear()


def test_a_key_is_asked_for_and_kept_for_the_tab(opened: Browser) -> None:
    with served(keys=Keys({"me": KEY})) as server:
        context = opened.new_context()
        page = context.new_page()
        page.goto(server.address)
        dialog = page.get_by_role("dialog", name="API key")
        dialog.get_by_label("API key").fill("not-the-right-one-at-all")
        dialog.get_by_role("button", name="Use this key").click()
        expect(page.get_by_role("dialog").get_by_text("an unknown one")).to_be_visible(timeout=PATIENCE)
        dialog.get_by_label("API key").fill(KEY)
        dialog.get_by_role("button", name="Use this key").click()
        expect(page.locator("#models li")).to_have_count(3)
        kept = "[localStorage.getItem('diptych-key'), sessionStorage.getItem('diptych-key')]"
        assert page.evaluate(kept) == [None, KEY]
        page.reload()
        expect(page.locator("#models li")).to_have_count(3)
        other = context.new_page()
        other.goto(server.address)
        expect(other.get_by_role("dialog", name="API key")).to_be_visible()
        context.close()


# -- for everybody ----------------------------------------------------------------------------------------------------

def test_tabs_and_colours_by_keyboard(studio: Studio) -> None:
    page = studio.page
    page.get_by_role("tab", name="Draw").focus()
    page.keyboard.press("ArrowDown")
    expect(page.get_by_role("tab", name="Edit")).to_be_focused()
    expect(page.get_by_role("tabpanel", name="Edit")).to_be_visible()
    page.keyboard.press("End")
    expect(page.get_by_role("tab", name="History")).to_have_attribute("aria-selected", "true")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tabpanel", name="Chat")).to_be_visible()
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    for _ in range(2):
        page.get_by_role("button", name=re.compile("Colours")).press("Enter")
    assert page.evaluate(ground) != light
    page.reload()
    assert page.evaluate(ground) != light, "remembered"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(opened: Browser, address: str, scheme: str) -> None:
    studio = Studio(opened, address, color_scheme=scheme, bypass_csp=True, reduced_motion="reduce")
    for name in VIEWS:
        studio.view(name)
        assert not studio.complaints(), f"{name}, empty"
    view = studio.draw(model="raster")
    view.get_by_role("slider", name="Step of drawing").fill("3")
    view.get_by_role("button", name="Place boxes").click()
    view.get_by_role("button", name="Add a box").click()
    view.get_by_text("Recipe", exact=True).click()
    assert not studio.complaints(), "Draw"
    view.get_by_role("button", name="Edit this").click()
    studio.page.get_by_role("application").wait_for()
    assert not studio.complaints(), "Edit"
    inside = studio.view("Inside")
    inside.get_by_role("button", name="Show the mask").click()
    studio.done(inside)
    assert not studio.complaints(), "Inside"
    history = studio.view("History")
    history.locator(".card").click()
    assert not studio.complaints(), "History"
    studio.close()


def test_a_phone_needs_no_sideways_scrolling(opened: Browser, address: str) -> None:
    studio = Studio(opened, address, viewport={"width": 360, "height": 740})
    view = studio.draw()
    view.get_by_role("button", name="Place boxes").click()
    view.get_by_role("button", name="Add a box").click()
    for name in VIEWS:
        studio.view(name)
        sides = "[document.documentElement, document.querySelector('main')].map(n => n.scrollWidth)"
        wide = studio.page.evaluate(sides)
        assert wide == [360, 360], name
    studio.close()
    assert not studio.wrong
