"""Serve models over HTTP, in the dialect of the OpenAI API."""
import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from diptych.cli import common

if TYPE_CHECKING:
    from diptych.systems.base import System

LEVELS = ("debug", "info", "warning", "error")


def add(parser: argparse.ArgumentParser) -> None:
    add_server(parser)
    parser.add_argument("--no-studio", action="store_true", help="leave away the pages for people, / and /ledger")


def add_server(parser: argparse.ArgumentParser) -> None:
    """What every verb that serves is told."""
    parser.add_argument("--model", action="append", metavar="NAME|NAME=FOLDER", dest="models",
                        help="a model to serve, under this name; repeat for several, the first is the default one "
                             f"(default: {common.DEFAULT_MODEL})")
    common.add_dtype(parser)
    common.add_device(parser)
    net = parser.add_argument_group("network")
    net.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine)")
    net.add_argument("--port", type=port, default=8000, help="0: any that is free (default: %(default)s)")
    net.add_argument("--cors", action="append", default=[], metavar="ORIGIN",
                     help="let pages of this origin use the API, such as https://example.org (default: none)")
    net.add_argument("--allow-host", action="append", default=[], metavar="NAME",
                     help="on this machine and without keys: another name that requests may ask for, say a proxy's")
    load = parser.add_argument_group("load")
    load.add_argument("--slots", type=common.positive, default=8, metavar="N",
                      help="answers that are made together, per model (default: %(default)s)")
    load.add_argument("--queue", type=common.positive, default=64, metavar="N",
                      help="answers that may wait, per model; more get status 429 (default: %(default)s)")
    load.add_argument("--replicas", type=common.positive, default=1, metavar="N",
                      help="processes per model, with N times the slots; more than one needs diptych[ray] "
                           "(default: %(default)s)")
    load.add_argument("--ray-address", metavar="ADDRESS",
                      help="of a Ray cluster to run the replicas in (default: this machine)")
    load.add_argument("--grace", type=common.positive, default=30, metavar="SECONDS",
                      help="to finish what runs when stopped (default: %(default)s)")
    guard = parser.add_argument_group("safety")
    guard.add_argument("--api-keys", type=Path, metavar="FILE",
                       help="keys that may call, one NAME:KEY a line; also from the variable DIPTYCH_API_KEYS")
    guard.add_argument("--rate", type=common.positive, metavar="N", help="requests per minute and key (default: any)")
    guard.add_argument("--allow-urls", action="store_true",
                       help="fetch pictures that requests name by address, from the open internet only")
    guard.add_argument("--max-pixels", type=common.positive, default=16_000_000, metavar="N",
                       help="of all pictures of a request together (default: %(default)s)")
    guard.add_argument("--max-body", type=common.positive, default=20 * 2**20, metavar="BYTES",
                       help="of a request (default: %(default)s)")
    guard.add_argument("--context", type=common.positive, default=2048, metavar="TOKENS",
                       help="of a prompt, and of an answer (default: %(default)s)")
    guard.add_argument("--policy", metavar="MODULE:FUNCTION",
                       help="asked about every text and picture, on both sides of the model")
    parser.add_argument("--log-level", choices=LEVELS, default="info", help="(default: %(default)s)")


def run(args: argparse.Namespace, ready: Callable[[str], None] | None = None) -> int:
    """Serves until it is stopped. `ready` is told the address when it listens."""
    started = time.monotonic()
    import uvicorn  # noqa: F401  # before a model is read: a missing package should be told at once

    from diptych.serve.auth import read_keys
    from diptych.serve.policy import load_policy

    keys = read_keys(args.api_keys)
    policy = None if args.policy is None else load_policy(args.policy)
    replicated = args.replicas > 1 or args.ray_address is not None
    if replicated:
        from diptych.serve.replicas import require

        require(args.ray_address)
    places = named_models(args.models or [common.DEFAULT_MODEL])
    check_free(args.host, args.port)
    from diptych.serve import Settings, create_app, logs
    from diptych.serve.run import LOOPBACK, Server

    guarded = args.host in LOOPBACK and keys is None
    device = replica_device(args) if replicated else "cpu"
    settings = Settings(
        slots=args.slots, queue=args.queue, max_body=args.max_body, max_pixels=args.max_pixels, context=args.context,
        rate=args.rate, allow_urls=args.allow_urls, cors=tuple(args.cors), grace=args.grace,
        studio=not args.no_studio, replicas=args.replicas, ray_address=args.ray_address, device=device,
        hosts=tuple(dict.fromkeys((*LOOPBACK, *args.allow_host))) if guarded else None)
    here = argparse.Namespace(**{**vars(args), "device": "cpu"}) if replicated else args
    app = create_app(load(places, here), settings, keys=keys, policy=policy)
    logs.configure(args.log_level)
    if keys is None and not guarded:
        logs.log.warning("anybody who reaches %s may use this server; fix: --api-keys", args.host)

    def listening(address: str) -> None:
        print(f"{', '.join(places)} on {address} after {time.monotonic() - started:.1f} s", flush=True)
        if ready is not None:
            ready(address)

    server = Server(app, args.host, args.port, listening)
    server.run()
    return 0 if server.started else 1


def named_models(texts: list[str]) -> dict[str, str]:
    """`mini`, `NAME=FOLDER` -> names and what `find_model` takes; wrong ones are told before anything is read."""
    places: dict[str, str] = {}
    for text in texts:
        name, equals, place = text.partition("=")
        place = place if equals else text
        name = name if equals else Path(text).name
        if not name or not place:
            raise ValueError(f"expected a model as NAME or NAME=FOLDER, got {text!r}")
        if name in places:
            raise ValueError(f"expected every model under a name of its own, got {name!r} twice; fix: NAME=FOLDER")
        common.find_model(place)
        places[name] = place
    return places


def replica_device(args: argparse.Namespace) -> str:
    """Where replicas compute; this process then only counts tokens. A cluster may have what this machine has not."""
    device = args.device if args.ray_address and args.device else str(common.set_up_device(args))
    if args.dtype == "int8" and device != "cpu":
        raise ValueError(f"expected replicas on a CPU with --dtype int8, got {device}; fix: --device cpu")
    return device


def load(places: dict[str, str], args: argparse.Namespace) -> "dict[str, System]":
    return {name: common.load_model(argparse.Namespace(**{**vars(args), "model": place}))
            for name, place in places.items()}


def check_free(host: str, number: int) -> None:
    """An error now rather than after the models are read."""
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, number))
        except OSError as error:
            raise ValueError(f"expected a free port, got {host}:{number} ({error.strerror}); fix: --port") from None


def port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return int(text)
