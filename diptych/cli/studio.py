"""The Studio: chat, draw, edit, compare and look inside, on a page that opens in the browser.

The same server as `diptych serve`, for this machine unless --host says otherwise.
"""
import argparse
import threading
import webbrowser

from diptych.cli import serve


def add(parser: argparse.ArgumentParser) -> None:
    serve.add_server(parser)
    parser.add_argument("--no-open", action="store_true", help="tell the address, and leave the browser alone")
    parser.set_defaults(no_studio=False, log_level="warning")


def run(args: argparse.Namespace) -> int:
    return serve.run(args, None if args.no_open else show)


def show(address: str) -> None:
    """Opens the page, beside the server: a browser that starts slowly would hold it up."""
    threading.Thread(target=webbrowser.open, args=(address,), name="diptych-browser", daemon=True).start()
