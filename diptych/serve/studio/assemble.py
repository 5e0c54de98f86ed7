"""One self-contained page out of the files in `page/`: a document, a style sheet and modules of JavaScript.

The modules are plain ones that import each other by `import {name} from "./file.js";`, one line each. On the page they
are one: the lines of import and the word `export` go, what is imported comes first, and a name must not be given twice
at the top of two files.
"""
import base64
import functools
import hashlib
import re
from pathlib import Path

PAGE = Path(__file__).parent / "page"
FIRST = "main.js"  # the module that starts the page
IMPORT = re.compile(r'^import \{[^}]*\} from "\./([\w-]+\.js)";\n', re.MULTILINE)
EXPORT = re.compile(r"^export (?=(async )?(function|const|let|class)\b)", re.MULTILINE)
INLINE = re.compile(r"<(script|style)(?: [^>]*)?>(.*?)</\1>", re.DOTALL)

# Nothing comes from elsewhere, and no text ever becomes markup or script (trusted types); pictures are made here.
POLICY = ("default-src 'none'; {inline}; img-src blob: data:; connect-src 'self'; frame-src 'self'; base-uri 'none'; "
          "form-action 'none'; frame-ancestors {ancestors}")
TRUSTED = "; require-trusted-types-for 'script'; trusted-types 'none'"


def modules(start: str = FIRST) -> list[str]:
    """Names of the files, each behind all that it imports."""
    order: list[str] = []
    path: list[str] = []

    def visit(name: str) -> None:
        if name in order:
            return
        if name in path:
            raise ValueError(f"expected modules without circles, got {' -> '.join([*path, name])}")
        path.append(name)
        for found in IMPORT.findall((PAGE / name).read_text(encoding="utf-8")):
            visit(found)
        path.pop()
        order.append(name)

    visit(start)
    return order


def joined() -> str:
    """All modules as one."""
    parts = [f"// -- {name}\n" + EXPORT.sub("", IMPORT.sub("", (PAGE / name).read_text(encoding="utf-8"))).strip()
             for name in modules()]
    return "\n\n".join(parts) + "\n"


@functools.cache
def page() -> tuple[str, str]:
    """The document and its Content-Security-Policy."""
    document = (PAGE / "page.html").read_text(encoding="utf-8")
    style = (PAGE / "style.css").read_text(encoding="utf-8")
    whole = document.replace("/* style */", style).replace("/* script */", joined())
    return whole, policy(whole, "'none'") + TRUSTED


def policy(document: str, ancestors: str) -> str:
    """What a page may do: run the scripts and styles that stand in it (by their hashes), and nothing else."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, content in INLINE.findall(document):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    inline = "; ".join(f"{kind}-src {' '.join(found) or chr(39) + 'none' + chr(39)}" for kind, found in hashes.items())
    return POLICY.format(inline=inline, ancestors=ancestors)
