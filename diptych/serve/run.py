"""Running the application with uvicorn: on the command line, or in a thread for tests and measurements."""
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from diptych.serve.settings import Settings

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Server(uvicorn.Server):
    """Tells when it is ready. When stopped it takes no more connections, finishes what runs (for `grace` seconds at
    most), and then stops the engines."""

    def __init__(self, app: FastAPI, host: str, port: int, ready: Callable[[str], None] | None = None) -> None:
        settings: Settings = app.state.context.settings
        super().__init__(uvicorn.Config(
            app, host=host, port=port, log_config=None, access_log=False, server_header=False, lifespan="on",
            # Not what happens to be installed: h11 is the one that bounds headers.
            http="h11", loop="asyncio", ws="none", h11_max_incomplete_event_size=32_768,
            timeout_graceful_shutdown=int(settings.grace)))
        self.ready = ready

    @property
    def address(self) -> str:
        """http://HOST:PORT, with the port that the system chose for 0."""
        sock: socket.socket = self.servers[0].sockets[0]
        host, port = sock.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self.ready is not None:
            self.ready(self.address)


@contextlib.contextmanager
def running(app: FastAPI, host: str = "127.0.0.1", port: int = 0) -> Iterator[Server]:
    """The server in a thread of its own while the block lasts."""
    ready = threading.Event()
    server = Server(app, host, port, lambda address: ready.set())
    thread = threading.Thread(target=server.run, name="diptych-serve", daemon=True)
    thread.start()
    try:
        if not ready.wait(30):
            raise OSError(f"expected a server on {host}:{port}, got none within 30 seconds")
        yield server
    finally:
        server.should_exit = True
        thread.join()
