"""Make the pictures of docs/studio.md: the Studio with the bundled model, in Chromium.

    python tools/studio_pictures.py [FOLDER]      (default: docs/pictures)
"""
import argparse
import io
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from PIL import Image  # noqa: E402

from diptych.adapters.published import open_model  # noqa: E402
from diptych.cli import common  # noqa: E402
from diptych.serve import Settings, create_app  # noqa: E402
from diptych.serve.run import running  # noqa: E402

WINDOW = {"width": 1180, "height": 820}
TALL = {"width": 1180, "height": 1030}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "docs" / "pictures")
    folder = parser.parse_args().folder
    from tests.studio import Studio, chromium

    model = open_model(common.find_model(common.DEFAULT_MODEL), device="cpu")
    with running(create_app({common.DEFAULT_MODEL: model}, Settings())) as server, chromium() as opened:
        studio = Studio(opened, server.address, viewport=WINDOW)
        view = studio.draw("a large red circle left of a blue square", model=common.DEFAULT_MODEL, seed=3)
        view.locator("details").first.evaluate("d => { d.open = false }")
        view.get_by_role("slider", name="Step of drawing").fill("7")
        keep(studio.page.screenshot(), folder / "studio-draw.png")
        studio.close()
        studio = Studio(opened, server.address, viewport=TALL, color_scheme="dark")
        inside = studio.view("Inside")
        inside.get_by_label("In a document").select_option("edit")
        studio.done(inside)
        keep(studio.page.screenshot(), folder / "studio-inside.png")
        studio.close()


def keep(shot: bytes, path: Path) -> None:
    picture = Image.open(io.BytesIO(shot)).convert("RGB")
    picture.quantize(method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
