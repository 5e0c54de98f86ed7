"""The command line: finds the verb, runs it, and turns the errors of users into one line each."""
import argparse
import difflib
import importlib
import keyword
import logging
import os
import sys
from collections.abc import Sequence
from types import ModuleType

import diptych

# verb -> what it does, in the order of `diptych --help`; each verb is the module diptych.cli.<verb>
VERBS = {
    "tour": "see everything the bundled model does, as one report page",
    "draw": "draw a picture from words",
    "ask": "ask a question about a picture",
    "caption": "describe a picture",
    "edit": "change a picture as an instruction says",
    "chat": "talk with pictures in both directions",
    "serve": "serve models over HTTP, in the dialect of the OpenAI API",
    "studio": "the same with a page for people, opened in the browser",
    "train": "train a system from a recipe",
    "align": "teach a trained model by rewards for what it says and draws",
    "sift": "part what a model answers right from what it answers wrong, for its next stages",
    "mine": "pairs to prefer by, from a model's own answers and a judge",
    "plan": "parameters, memory and time of a recipe, before the run",
    "eval": "measure a model on exact suites",
    "replicate": "measure a paper's claims against a control",
    "league": "train and measure every system at one budget",
    "ledger": "measured results: list, show, compare, or the page of all systems",
    "import": "make a published checkpoint a model of ours",
    "export": "write a model in a published layout",
    "ls": "list systems, ingredients, recipes and measured results",
    "show": "explain one system: idea, configuration, size, mask",
    "doctor": "check this machine, or a data set",
    "zoo": "list or rebuild the bundled ingredients and models",
    "parity": "compare a system with the published code's numbers",
}

USER_ERRORS = (ValueError, OSError, ModuleNotFoundError)
EXIT_ERROR, EXIT_INTERRUPT = 2, 130

# package that is not installed -> the extra that brings it
EXTRAS = {"transformers": "hf", "huggingface_hub": "hf", "webdataset": "data", "pyarrow": "data", "fastapi": "serve",
          "uvicorn": "serve", "python_multipart": "serve", "prometheus_client": "serve",
          "resvg_py": "svg", "av": "video", "soundfile": "audio", "ray": "ray", "trackio": "track"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 1 checked and failed, 2 error, 130 interrupted)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    wanted = next((a for a in argv if not a.startswith("-")), None)
    if wanted is not None and wanted not in VERBS:
        return _complain(_unknown(wanted))
    args = build_parser(wanted).parse_args(argv)
    logging.basicConfig(level=logging.DEBUG if args.debug else logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return int(args.execute(args) or 0)
    except BrokenPipeError:
        # The reader (`| head`) has seen enough; a second failure at interpreter exit must not show either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _complain("interrupted", EXIT_INTERRUPT)
    except USER_ERRORS as error:
        if args.debug or _missing_package(error).startswith("diptych"):  # a file of ours is missing: a bug
            raise
        return _complain(explain(error))


def build_parser(wanted: str | None = None) -> argparse.ArgumentParser:
    """The parser. Only the verb that is `wanted` gets its arguments: the others need their names and a line of help."""
    parser = argparse.ArgumentParser(
        prog="diptych", description="Models that both see and draw.", allow_abbrev=False,
        epilog="`diptych VERB --help` explains one verb. `diptych tour -o report/` is a good start.")
    parser.add_argument("--version", action="version", version=f"diptych {diptych.__version__}")
    common = argparse.ArgumentParser(add_help=False)
    for target, default in ((parser, False), (common, argparse.SUPPRESS)):  # both places, the later one wins
        target.add_argument("--debug", action="store_true", default=default,
                            help="show the traceback of an error and debug messages")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name, summary in VERBS.items():
        if wanted not in (None, name):
            continue
        sub = verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".",
                               parents=[common], allow_abbrev=False)
        if wanted == name:
            module = verb_module(name)
            module.add(sub)
            sub.set_defaults(execute=module.run)  # not `run`: an option may be called --run
    return parser


def verb_module(name: str) -> ModuleType:
    return importlib.import_module(f"diptych.cli.{name}{'_' if keyword.iskeyword(name) else ''}")


def explain(error: BaseException) -> str:
    """One line for a user error."""
    if isinstance(error, ModuleNotFoundError):
        package = _missing_package(error)
        extra = EXTRAS.get(package)
        fix = f"pip install 'diptych[{extra}]'" if extra else f"pip install {package}"
        return f"expected the package {package}, which is not installed; fix: {fix}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _missing_package(error: BaseException) -> str:
    return (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""


def entrypoint() -> None:
    sys.exit(main())


def _unknown(verb: str) -> str:
    near = difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else "`diptych --help` lists them"
    return f"expected a verb ({', '.join(VERBS)}), got {verb!r}; fix: {hint}"


def _complain(message: str, code: int = EXIT_ERROR) -> int:
    print(f"diptych: error: {message}", file=sys.stderr)
    return code
