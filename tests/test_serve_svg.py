"""SVG from strangers: what stays is harmless, what would be too much work is refused."""
import importlib.util
import xml.etree.ElementTree as tree

import numpy as np
import pytest

from diptych.serve import svg
from diptych.serve.svg import looks_like_svg, sanitise
from tests.serving import Local, make, shown

HEAD = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="64" height="64"'
DRAWS = importlib.util.find_spec("resvg_py") is not None


def drawn(inside: str, head: str = HEAD) -> bytes:
    return f"<svg {head}>{inside}</svg>".encode()


def clean(inside: str) -> str:
    source, width, height = sanitise(drawn(inside))
    assert (width, height) == (64, 64)
    tree.fromstring(source)
    return source


def test_what_is_harmless_stays():
    inside = ('<defs><linearGradient id="g"><stop offset="0" stop-color="#f00"/></linearGradient>'
              '<g id="s"><circle cx="5" cy="5" r="3"/></g></defs><rect width="9" height="9" fill="url(#g)" '
              'style="stroke: blue; opacity:.5" transform="rotate(3)"/><use xlink:href="#s" x="4"/>'
              '<path d="M0 0L9 9"/><text x="1" y="2" font-size="5">a &lt; b</text>')
    source = clean(inside)
    for kept in ('fill="url(#g)"', "stroke:blue;opacity:.5", 'href="#s"', 'd="M0 0L9 9"', "a &lt; b", "linearGradient"):
        assert kept in source, kept
    assert clean(inside) == clean(inside) and sanitise(source.encode())[0] == source, "clean is clean"


@pytest.mark.parametrize("inside", [
    "<script>alert(1)</script>", "<script xlink:href='http://a/x.js'/>", "<rect onclick='alert(1)'/>",
    "<rect ONLOAD='alert(1)'/>",
    "<foreignObject><body xmlns='http://www.w3.org/1999/xhtml'>alert</body></foreignObject>",
    "<image xlink:href='file:///etc/passwd'/>", "<image href='http://10.0.0.1/x.png'/>",
    "<image href='data:image/png,x'/>",
    "<use xlink:href='http://a/x.svg#y'/>", "<use href='other.svg#y'/>", "<use href='//a/x#y'/>",
    "<rect fill='url(http://a/x#y)'/>", "<rect fill='url(\"file:///etc/passwd#y\")'/>", "<rect fill='URL( //a#b )'/>",
    "<rect style='fill:url(http://a/x)'/>", "<rect style='background:expression(alert(1))'/>",
    "<rect style='fill:\\75rl(http://a)'/>", "<style>@import url(http://a/x.css);</style>",
    "<style>rect { fill: url(file:///etc/passwd) }</style>", "<a xlink:href='javascript:alert(1)'><rect/></a>",
    "<animate attributeName='href' to='javascript:alert(1)'/>", "<set attributeName='onload' to='alert(1)'/>",
    "<filter id='f'><feImage href='http://a/x.png'/></filter>", "<handler>alert(1)</handler>",
    "<rect xml:base='http://a/'/>", "<metadata>alert file:</metadata>", "<pattern id='p' width='99999'/>",
    "<line stroke-dasharray='0.0001'/>", "<?xml-stylesheet href='http://a/x.css'?>", "<!-- http://a/ -->",
    "<evil:script xmlns:evil='http://evil/'>alert(1)</evil:script>",
    "<text><![CDATA[<script>alert(1)</script>]]></text>"])
def test_what_is_not_goes(inside):
    source = clean(inside)
    for bad in ("<script", "onclick", "ONLOAD", "http://a", "http://10", "file:", "data:", "javascript", "other.svg",
                "import", "expression", "75rl", "//a", "foreignObject", "animate", "<set", "feImage", "handler",
                "pattern", "dash", "base=", "metadata"):
        assert bad not in source.replace(svg.SVG, ""), (bad, source)


BILLION = "".join(f'<g id="a{i}"><use href="#a{i + 1}"/><use href="#a{i + 1}"/></g>' for i in range(30))


@pytest.mark.parametrize(("data", "told"), [
    (b'<!DOCTYPE svg [<!ENTITY a "b">]><svg>&a;</svg>', "entities"),
    (b'<!DOCTYPE svg [<!ENTITY a SYSTEM "file:///etc/passwd">]><svg>&a;</svg>', "entities"),
    (b'<!DOCTYPE svg [<!ENTITY % a SYSTEM "http://a/x"> %a;]><svg/>', "entities"),
    (b'<!DOCTYPE svg SYSTEM "http://a/x.dtd"><svg width="9" height="9">&b;</svg>', "entities"),
    (b"<svg>&undefined;</svg>", "damaged"), (b"<svg", "damaged"), (b"<html/>", "SVG document"), (b"", "damaged"),
    (b"\xff\xfe<svg/>", "damaged"), (drawn("", "width='9'"), "width and height"),
    (drawn("", "width='0' height='9'"), "width"),
    (drawn("", "width='99999' height='9'"), "width"), (drawn("", "viewBox='0 0 1e9 1e9'"), "width"),
    (drawn("", "viewBox='a b c d'"), "width"), (drawn("", "width='1e3' height='NaN'"), "width"),
    (drawn("<g>" * 40 + "</g>" * 40), "deep"), (drawn("<rect/>" * 10_001), "10000 elements"),
    (drawn("<rect/>" * 600, "width='2000' height='2000'"), "500 elements"), (drawn(BILLION), "references"),
    (drawn('<g id="a"><use href="#a"/></g>'), "themselves"),
    (drawn('<g id="a"><use href="#b"/></g><g id="b"><use href="#a"/></g>'), "themselves"),
    (drawn('<mask id="m"><rect mask="url(#m)"/></mask>'), "themselves"),
    (b"<svg>" + b" " * 1_000_000 + b"</svg>", "bytes")])
def test_what_would_be_too_much_is_refused(data, told):
    with pytest.raises(ValueError, match=told):
        sanitise(data)


def test_an_id_is_given_once():
    source = clean('<g id="a"><rect/></g><g id="a"><circle r="1"/></g><use href="#a"/>')
    assert source.count('id="a"') == 1


def test_an_svg_is_recognised():
    for data in (drawn(""), b"\xef\xbb\xbf<?xml version='1.0'?>\n<svg/>", b"<!-- c --><svg/>", b"  <SVG/>"):
        assert looks_like_svg(data), data
    for data in (b"", b"\x89PNG\r\n\x1a\n<svg", b"GIF89a<svg/>", b"<?xml version='1.0'?><html/>"):
        assert not looks_like_svg(data), data


def test_a_chat_with_an_svg():
    with Local(make()) as local:
        answer = local.chat(shown(drawn("<rect width='64' height='64' fill='red'/>"), "svg+xml"), seed=1)
        if not DRAWS:
            assert answer.status_code == 400 and "diptych[svg]" in answer.text
            return
        assert answer.status_code == 200, answer.text
        refused = local.chat(shown(drawn(BILLION), "svg+xml"))
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "invalid_image"


@pytest.mark.skipif(not DRAWS, reason="resvg-py is not installed")
def test_an_svg_is_drawn():
    from diptych.data.images import decode_image

    picture = decode_image(svg.rasterise(drawn("<rect width='32' height='64' fill='#f00'/><image href='file:///x'/>")))
    array = picture.to_uint8()
    assert array.shape == (64, 64, 3)
    assert np.array_equal(array[5, 5], [255, 0, 0]) and np.array_equal(array[5, 60], [255, 255, 255])
