"""SVG from strangers: rewritten from what is known to be harmless, then drawn to pixels.

The source is parsed without any entity of its own and written anew: elements and attributes that are on the lists below
stay, everything else goes: scripts, event handlers, style sheets, animation, filters, foreign objects, pictures, and
every reference that is not to an element of the same document. Patterns and dashes go too: few bytes of them can ask
for any amount of memory and time. Entities, too many elements for the canvas (with all that references repeat) and
documents nested too deep are refused. So the renderer meets no network, no file, and no more work than the size says.
"""
import re
import xml.parsers.expat
from collections.abc import Mapping
from dataclasses import dataclass, field
from xml.sax.saxutils import escape, quoteattr

MAX_BYTES = 1_000_000
MAX_ELEMENTS = 10_000  # with all that `use` and `url(#...)` repeat
MAX_WORK = 2_000_000_000  # elements times pixels of the canvas
DEEPEST = 32  # every level may take a layer as large as the canvas
MAX_SIDE = 2048  # pixels

KNOWN_ELEMENTS = """
    svg g path rect circle ellipse line polyline polygon text tspan defs linearGradient radialGradient stop clipPath
    mask use symbol marker title desc"""
KNOWN_ATTRIBUTES = """
    id class x y x1 y1 x2 y2 cx cy r rx ry fx fy fr d points width height viewBox preserveAspectRatio transform
    pathLength fill fill-opacity fill-rule stroke stroke-width stroke-opacity stroke-linecap stroke-linejoin
    stroke-miterlimit opacity color display visibility clip-path clip-rule mask clipPathUnits maskUnits
    maskContentUnits gradientUnits gradientTransform spreadMethod offset stop-color stop-opacity markerWidth
    markerHeight markerUnits refX refY orient marker-start marker-mid marker-end overflow paint-order vector-effect
    shape-rendering text-anchor font-size font-family font-weight font-style dominant-baseline alignment-baseline
    letter-spacing word-spacing text-decoration dx dy rotate textLength lengthAdjust version"""
ELEMENTS, ATTRIBUTES = frozenset(KNOWN_ELEMENTS.split()), frozenset(KNOWN_ATTRIBUTES.split())
LOCAL = re.compile(r"\A\s*#[\w.:-]+\s*\Z")
URL = re.compile(r"url\s*\(\s*(['\"]?)\s*(.*?)\s*\1\s*\)", re.IGNORECASE | re.DOTALL)
# what has no place in a value once every local url(#...) is taken out
SUSPECT = re.compile(r"url|expression|javascript|import|@|\\|&|<|data:|file:|https?:", re.IGNORECASE)
NUMBER = re.compile(r"\A\s*([0-9]*\.?[0-9]+)(px)?\s*\Z")
XLINK = "http://www.w3.org/1999/xlink"
SVG = "http://www.w3.org/2000/svg"


@dataclass
class Node:
    name: str
    attributes: dict[str, str]
    children: "list[Node | str]" = field(default_factory=list)


def looks_like_svg(data: bytes) -> bool:
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return head.startswith((b"<svg", b"<?xml", b"<!doctype svg", b"<!--")) and (b"<svg" in data[:65536].lower())


def sanitise(data: bytes) -> tuple[str, int, int]:
    """(a harmless SVG, its width, its height in pixels); ValueError for what is no SVG or is a bomb."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"expected an SVG of at most {MAX_BYTES} bytes, got {len(data)}")
    root = _parse(data)
    if root.name != "svg":
        raise ValueError(f"expected an SVG document, got one of {root.name[:40]!r}")
    width, height = _size(root.attributes)
    _weigh(root, width * height)
    root.attributes |= {"width": str(width), "height": str(height)}
    return _write(root, outermost=True), width, height


def rasterise(data: bytes) -> bytes:
    """PNG of an SVG; the package resvg-py draws it."""
    try:
        import resvg_py
    except ModuleNotFoundError:
        raise ValueError("expected a picture of pixels, got an SVG, which this server cannot draw; fix: send a PNG, or "
                         "install 'diptych[svg]' on the server") from None
    source, width, height = sanitise(data)
    try:
        drawn = resvg_py.svg_to_bytes(svg_string=source, width=width, height=height, background="white")
    except ValueError as error:
        raise ValueError(f"expected an SVG that can be drawn, got: {str(error)[:120]}") from None
    return bytes(drawn)


# -- reading ----------------------------------------------------------------------------------------------------------

def _parse(data: bytes) -> Node:
    """The tree of what stays. Expat, with everything that reads more than these bytes switched off."""
    parser = xml.parsers.expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    stack: list[Node | None] = []  # None: an element that goes, with all that is in it
    roots: list[Node] = []
    count = 0

    def refuse(*_: object) -> int:
        raise ValueError("expected an SVG without entities, got a document type that declares some")

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal count
        count += 1
        if count > MAX_ELEMENTS or len(stack) >= DEEPEST:
            raise ValueError(f"expected an SVG of at most {MAX_ELEMENTS} elements, {DEEPEST} deep, got more")
        space, _, local = name.rpartition(" ")
        inside = not stack or stack[-1] is not None
        known = inside and space in ("", SVG) and (local in ELEMENTS or not stack)
        node = Node(local, _kept(attributes)) if known else None
        if node is not None:
            parent = stack[-1] if stack else None
            (roots if parent is None else parent.children).append(node)  # type: ignore[arg-type]
        stack.append(node)

    def text(value: str) -> None:
        if stack and stack[-1] is not None and stack[-1].name in ("text", "tspan", "title", "desc"):
            stack[-1].children.append(value)

    parser.StartElementHandler = start
    parser.EndElementHandler = lambda name: stack.pop()
    parser.CharacterDataHandler = text
    parser.EntityDeclHandler = refuse
    parser.UnparsedEntityDeclHandler = refuse
    parser.NotationDeclHandler = refuse
    parser.AttlistDeclHandler = refuse
    parser.ElementDeclHandler = refuse
    parser.ExternalEntityRefHandler = refuse
    parser.SkippedEntityHandler = refuse
    try:
        parser.Parse(data, True)
    except (xml.parsers.expat.ExpatError, LookupError) as error:
        raise ValueError(f"expected an SVG, got damaged XML: {error}") from None
    if not roots:
        raise ValueError("expected an SVG, got a document without elements")
    return roots[0]


def _kept(attributes: Mapping[str, str]) -> dict[str, str]:
    out: dict[str, str] = {}
    for full, value in attributes.items():
        space, _, name = full.rpartition(" ")
        if name == "href" and space in ("", XLINK):
            if LOCAL.match(value):
                out["href"] = value.strip()
        elif space:
            continue
        elif name == "style":
            pairs = (part.partition(":") for part in value.split(";"))
            fine = {key.strip(): told.strip() for key, colon, told in pairs
                    if key.strip() in ATTRIBUTES and _harmless(told)}
            if fine:
                out["style"] = ";".join(f"{key}:{told}" for key, told in fine.items())
        elif name in ATTRIBUTES and _harmless(value):
            out[name] = value
    return out


def _harmless(value: str) -> bool:
    """Whether all references of a value are to elements of the same document."""
    targets = [m.group(2) for m in URL.finditer(value)]
    return all(LOCAL.match(t) for t in targets) and not SUSPECT.search(URL.sub("", value))


# -- measuring --------------------------------------------------------------------------------------------------------

def _size(attributes: Mapping[str, str]) -> tuple[int, int]:
    """Width and height in pixels: what the document says, or the size of its view box."""
    sides = [NUMBER.match(attributes.get(name, "")) for name in ("width", "height")]
    values = [float(m.group(1)) if m else 0.0 for m in sides]
    if not all(values):
        box = re.split(r"[\s,]+", attributes.get("viewBox", "").strip())
        try:
            values = [float(box[2]), float(box[3])] if len(box) == 4 else [0.0, 0.0]
        except ValueError:
            values = [0.0, 0.0]
    if not all(0 < v <= MAX_SIDE for v in values):
        raise ValueError(f"expected an SVG with a width and height (or a viewBox) of at most {MAX_SIDE} pixels, got "
                         "none or more")
    width, height = (max(1, round(v)) for v in values)
    return width, height


def _weigh(root: Node, pixels: int) -> None:
    """An error if drawing would touch too many elements for so many pixels: references repeat what they refer to."""
    named: dict[str, Node] = {}
    queue: list[Node | str] = [root]
    for node in queue:
        if isinstance(node, Node):
            name = node.attributes.get("id", "")
            if named.setdefault(name, node) is not node:
                node.attributes.pop("id", None)  # renderers differ in which of two they take
            queue += node.children
    known: dict[int, int] = {}
    open_: set[int] = set()

    def weight(node: Node) -> int:
        if id(node) in open_:
            raise ValueError("expected an SVG whose elements do not refer to themselves, got one that does")
        if id(node) not in known:
            open_.add(id(node))
            told = [t for value in node.attributes.values() for t in _references(value)]
            below = [c for c in node.children if isinstance(c, Node)] + [named[t] for t in told if t in named]
            known[id(node)] = min(1 + sum(weight(child) for child in below), MAX_ELEMENTS + 1)
            open_.remove(id(node))
        return known[id(node)]

    try:
        total = weight(root)
    except RecursionError:
        total = MAX_ELEMENTS + 1
    if total > min(MAX_ELEMENTS, MAX_WORK // pixels):
        raise ValueError(f"expected an SVG that draws at most {min(MAX_ELEMENTS, MAX_WORK // pixels)} elements on so "
                         "large a canvas, got more, or as many by references")


def _references(value: str) -> list[str]:
    found = [m.group(2) for m in URL.finditer(value)]
    if LOCAL.match(value):
        found.append(value)
    return [t.strip()[1:] for t in found]


def _write(node: Node, outermost: bool = False) -> str:
    space = f' xmlns="{SVG}"' if outermost else ""
    told = "".join(f" {name}={quoteattr(value)}" for name, value in node.attributes.items())
    inside = "".join(escape(c) if isinstance(c, str) else _write(c) for c in node.children)
    return f"<{node.name}{space}{told}>{inside}</{node.name}>"
