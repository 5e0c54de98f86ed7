"""Claims of papers measured on the world: control and treatment at equal budget, several seeds, a verdict.

    diptych replicate NAME            trains and measures every arm, writes a page, a plot and a ledger entry
    diptych replicate NAME --quick    a short run that only shows that the machinery works

A study is a value of `Study` in `diptych.replication.studies.NAME`, called STUDY.
"""
import difflib
import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diptych.replication.study import Study

STUDIES = Path(__file__).parent / "studies"


def names() -> tuple[str, ...]:
    """All studies, as the command line calls them."""
    return tuple(sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules([str(STUDIES)])))


def find(name: str) -> "Study":
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1, 0.0)
        hint = f"; fix: did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"expected a study out of {', '.join(names()) or 'none'}, got {name!r}{hint}")
    return importlib.import_module(f"diptych.replication.studies.{name.replace('-', '_')}").STUDY
