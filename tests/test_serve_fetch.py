"""Addresses of pictures: fetched from the open internet only, whatever names and redirects say."""
import contextlib
import http.server
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from diptych.serve import Settings
from diptych.serve.errors import ApiError
from diptych.serve.fetch import Fetcher, is_public
from diptych.serve.pictures import Reader
from tests.serving import Local, make, png

Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


@contextlib.contextmanager
def site(pages: dict[str, Answer]) -> Iterator[tuple[int, list[str]]]:
    """A server of this machine: (its port, what was asked of it)."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.headers['host']}{self.path}")
            with contextlib.suppress(OSError):
                pages[self.path](self)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server.server_address[1], asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def page(body: bytes, status: int = 200, **headers: str) -> Answer:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)
    return answer


def drip(handler: http.server.BaseHTTPRequestHandler) -> None:
    """A byte now and then: every read is in time, the whole never ends."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b"x")
        handler.wfile.flush()
        time.sleep(0.05)


def drip_headers(handler: http.server.BaseHTTPRequestHandler) -> None:
    for _ in range(100):
        handler.wfile.write(b"H")
        handler.wfile.flush()
        time.sleep(0.05)


def here(**how) -> Fetcher:
    """Takes this machine for the internet."""
    told = {"seconds": 5.0, "largest": 100_000, "resolve": lambda host, port: ["127.0.0.1"],
            "allowed": lambda address: True, "ports": None, **how}
    return Fetcher(**told)  # type: ignore[arg-type]


@pytest.mark.parametrize("address", [
    "127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1",
    "224.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1",
    "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
    "2001:db8::1", "example.org", ""])
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "64:ff9b::808:808"])
def test_addresses_that_are(address):
    assert is_public(address)


def test_a_picture_is_fetched():
    with site({"/a.png?x=1": page(b"bytes")}) as (port, asked):
        assert here().fetch(f"http://pictures.example:{port}/a.png?x=1") == b"bytes"
        assert asked == [f"pictures.example:{port}/a.png?x=1"], "in the name of the host"


@pytest.mark.parametrize("url", [
    "ftp://a.example/x", "file:///etc/passwd", "gopher://a.example", "http://", "http:///x", "//a.example/x",
    "http://user:pass@a.example/", "http://a.example:22/", "http://a.example:99999/", "http://a.example/\r\nX: y",
    "http://a.example/ x", "http://a.ex\u0430mple/", "http://a.example\\@b.example/", "http://[::1", "x" * 3000,
    "http://127.0.0.1/", "http://2130706433/", "http://0x7f.1/", "http://localhost/", "http://[::ffff:127.0.0.1]/"])
def test_addresses_that_are_never_asked(url, monkeypatch):
    def no_connection(*args, **kwargs):
        raise AssertionError("expected no connection")

    monkeypatch.setattr(socket, "create_connection", no_connection)
    with pytest.raises(ApiError) as error:
        Fetcher(seconds=1, largest=1000).fetch(url)
    assert error.value.status_code == 400 and error.value.code == "invalid_image_url"


def test_a_name_with_one_private_address_is_refused():
    fetcher = Fetcher(seconds=1, largest=1000, resolve=lambda host, port: ["8.8.8.8", "10.0.0.1"])
    with pytest.raises(ApiError, match="not public"):
        fetcher.fetch("http://mixed.example/")


def test_a_name_that_changes_its_mind_gains_nothing():
    """DNS rebinding: the second answer would be private; there is no second question."""
    with site({"/": page(b"fine")}) as (port, _):
        answers = iter([["127.0.0.1"], ["10.0.0.1"]])
        checked: list[str] = []
        fetcher = here(resolve=lambda host, port: next(answers),
                       allowed=lambda a: (checked.append(a), a != "10.0.0.1")[1])
        assert fetcher.fetch(f"http://rebinds.example:{port}/") == b"fine"
        assert checked == ["127.0.0.1"] and next(answers) == ["10.0.0.1"], "asked once, connected to what was checked"


def test_redirects_are_checked_again():
    names = {"out.example": ["127.0.0.1"], "in.example": ["10.0.0.1"]}
    with site({"/in": page(b"", 302, Location="http://in.example/secret"),
               "/file": page(b"", 301, Location="file:///etc/passwd"), "/round": page(b"", 307, Location="/round"),
               "/on": page(b"", 308, Location="there"), "/there": page(b"got there"),
               "/none": page(b"", 302)}) as (port, asked):
        fetcher = here(resolve=lambda host, port: names[host], allowed=lambda a: a == "127.0.0.1")
        base = f"http://out.example:{port}"
        assert fetcher.fetch(f"{base}/on") == b"got there"
        for path, told in (("/in", "not public"), ("/file", "scheme"), ("/round", "3 redirects"),
                           ("/none", "redirects")):
            with pytest.raises(ApiError, match=told):
                fetcher.fetch(base + path)
        assert sum(a.endswith("/round") for a in asked) == 4
    with pytest.raises(ApiError, match="https to http"):
        here()._checked("http://a.example/", True)


def test_answers_that_are_too_much():
    with site({"/big": page(b"x" * 2000), "/told": page(b"", Content_Length="2000"), "/drip": drip,
               "/headers": drip_headers, "/gone": page(b"", 404), "/zip": page(b"", Content_Encoding="gzip"),
               "/odd": page(b"", Content_Length="-1")}) as (port, _):
        for path, told in (("/big", "more than 1000 bytes"), ("/told", "more than 1000 bytes"), ("/gone", "status 404"),
                           ("/zip", "compressed"), ("/odd", "more than")):
            with pytest.raises(ApiError, match=told):
                here(largest=1000).fetch(f"http://a.example:{port}{path}")
        for path in ("/drip", "/headers"):
            began = time.monotonic()
            with pytest.raises(ApiError, match="in time"):
                here(seconds=0.4).fetch(f"http://a.example:{port}{path}")
            assert time.monotonic() - began < 3
    with pytest.raises(ApiError, match="no answer"):
        here().fetch(f"http://a.example:{port}/")


def test_a_chat_with_an_address():
    settings = Settings(allow_urls=True)
    photo = png(64, 64)
    with site({"/a.png": page(photo), "/a.txt": page(b"secret of this machine")}) as (port, asked):
        with Local(make(settings, reader=Reader(settings, here()))) as local:
            def ask(url: str):
                return local.chat({"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what ?"},
                                  seed=1)

            fetched = ask(f"http://a.example:{port}/a.png")
            assert fetched.status_code == 200 and len(asked) == 1
            wrong = ask(f"http://a.example:{port}/a.txt")
            assert wrong.status_code == 400 and "secret" not in wrong.text
        with Local(make(settings)) as local:
            local.loop.slow_callback_duration = 10
            refused = local.chat({"type": "image_url", "image_url": {"url": f"http://127.0.0.1:{port}/a.png"}})
            assert refused.status_code == 400 and "port" in refused.text and len(asked) == 2
