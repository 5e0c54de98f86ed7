"""Fetching a picture that a request names by its address, without becoming anybody's errand boy.

A name is resolved once, every address it has must be a public one, and the connection goes to an address that was
checked, not to the name: what the name says a moment later (DNS rebinding) does not matter. Every redirect is checked
again in the same way. Only http and https on their own ports, no credentials, no proxies, no compression; sizes and the
whole time are limited. Off unless the operator allows it.
"""
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urljoin, urlsplit

from diptych.serve.errors import ApiError

PORTS = {"http": 80, "https": 443}
REDIRECTS = 3
LONGEST = 2000  # characters of an address
CHUNK = 65536

Resolve = Callable[[str, int], Sequence[str]]


def resolve(host: str, port: int) -> list[str]:
    """All IP addresses of a host; raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(info[4][0]) for info in found))


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the open internet; addresses that carry another are judged by that."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified or ip.is_loopback
                                 or ip.is_link_local or ip.is_private)


@dataclass(frozen=True, kw_only=True)
class Fetcher:
    """`seconds` for everything together, `largest` in bytes. `resolve`, `allowed` and `ports` are what tests replace to
    reach servers of this machine; `ports` None: any."""

    seconds: float
    largest: int
    resolve: Resolve = resolve
    allowed: Callable[[str], bool] = is_public
    ports: frozenset[int] | None = field(default_factory=lambda: frozenset(PORTS.values()))

    def fetch(self, url: str) -> bytes:
        """The bytes at an address. Blocks; ApiError if they are not to be had."""
        deadline = time.monotonic() + self.seconds
        secure = False
        for _ in range(REDIRECTS + 1):
            parts = self._checked(url, secure)
            secure = parts.scheme == "https"
            target = self._get(parts, deadline)
            if isinstance(target, bytes):
                return target
            url = urljoin(url, target)
        raise _no(f"more than {REDIRECTS} redirects")

    def _checked(self, url: str, secure: bool) -> SplitResult:
        """The parts of an address that may be asked at all."""
        if len(url) > LONGEST or not url.isascii() or any(c <= " " or c == "\\" for c in url):
            raise _no("an address that is too long, or has other characters than an address has")
        try:
            parts = urlsplit(url)
            port = parts.port or PORTS.get(parts.scheme, 0)
        except ValueError:
            raise _no("no address") from None
        if parts.scheme not in PORTS or not parts.hostname:
            raise _no(f"the scheme {parts.scheme[:20]!r}")
        if secure and parts.scheme != "https":
            raise _no("a redirect from https to http")
        if parts.username is not None or parts.password is not None:
            raise _no("credentials in the address")
        if self.ports is not None and port not in self.ports:
            raise _no(f"port {port}")
        return parts

    def _get(self, parts: SplitResult, deadline: float) -> bytes | str:
        """The body, or where a redirect leads."""
        host, port = parts.hostname or "", parts.port or PORTS[parts.scheme]
        try:
            addresses = self.resolve(host, port)
        except (OSError, UnicodeError):
            raise _no("a name that cannot be resolved") from None
        if not addresses or not all(self.allowed(a) for a in addresses):
            raise _no("a name with an address that is not public")
        connection = _Pinned(host, port, addresses[0], parts.scheme == "https", deadline)
        # A server that sends a byte now and then would keep every single read within its time.
        watch = threading.Timer(max(0.0, deadline - time.monotonic()), connection.cut)
        watch.daemon = True
        watch.start()
        try:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", path, headers={"Accept": "image/*", "Accept-Encoding": "identity",
                                                     "User-Agent": "diptych", "Connection": "close"})
            answer = connection.getresponse()
            if answer.status in (301, 302, 303, 307, 308):
                return answer.getheader("Location") or ""
            if answer.status != 200:
                raise _no(f"status {answer.status}")
            if (answer.getheader("Content-Encoding") or "identity").lower() != "identity":
                raise _no("a compressed answer")
            return self._body(answer, deadline)
        except (OSError, http.client.HTTPException, ValueError) as error:
            late = time.monotonic() >= deadline
            raise _no("no answer in time" if late else f"no answer ({type(error).__name__})") from None
        finally:
            watch.cancel()
            connection.close()

    def _body(self, answer: http.client.HTTPResponse, deadline: float) -> bytes:
        length = answer.getheader("Content-Length") or "0"
        if not length.isdigit() or int(length[:15]) > self.largest:
            raise _no(f"more than {self.largest} bytes")
        parts, size = list[bytes](), 0
        while chunk := answer.read1(CHUNK):
            size += len(chunk)
            parts.append(chunk)
            if size > self.largest:
                raise _no(f"more than {self.largest} bytes")
            if time.monotonic() >= deadline:
                raise _no("no answer in time")
        return b"".join(parts)


class _Pinned(http.client.HTTPConnection):
    """Speaks with one IP address, in the name of a host: TLS checks the certificate of the name."""

    def __init__(self, host: str, port: int, address: str, secure: bool, deadline: float) -> None:
        super().__init__(host, port, timeout=max(0.1, deadline - time.monotonic()))
        self.address, self.secure = address, secure

    def connect(self) -> None:
        raw = socket.create_connection((self.address, self.port), self.timeout)
        self.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=self.host) if self.secure else raw

    def cut(self) -> None:
        if self.sock is not None:
            try:
                self.sock.shutdown(socket.SHUT_RDWR)
            except OSError:  # closed a moment ago
                pass


def _no(what: str) -> ApiError:
    return ApiError(400, f"expected a picture at the address, got {what}; fix: send it as a data URL",
                    code="invalid_image_url")
