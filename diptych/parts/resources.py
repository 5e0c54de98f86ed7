"""Where shipped files lie: `zoo/NAME` in a config means a file of the package, anything else a path."""
import json
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parent.parent / "zoo" / "weights"


def locate(source: str | Path, suffix: str) -> Path:
    """The file that `source` names: `zoo/codec` with suffix ".json" is the shipped `codec.json`."""
    shipped = str(source).startswith("zoo/")
    path = SHIPPED / (str(source)[4:] + suffix) if shipped else Path(source)
    if not path.is_file():
        fix = f"run `diptych zoo build {str(source)[4:]}`" if shipped else "check the path"
        raise FileNotFoundError(f"expected a file at {path} for {str(source)!r}, got none; fix: {fix}")
    return path


def is_saved(folder: Path) -> bool:
    """Whether a folder holds a saved system (`systems.io`)."""
    path = folder / "config.json"
    try:
        return path.is_file() and "system" in json.loads(path.read_text())
    except ValueError:
        return False


def stored_config(source: str) -> dict[str, Any]:
    """The config beside shipped weights."""
    return json.loads(locate(source, ".json").read_text())["config"]


def bundled_models() -> dict[str, Path]:
    """Folders of the models that come with the package, by name."""
    return {path.parent.name: path.parent for path in sorted(SHIPPED.glob("*/config.json"))}
