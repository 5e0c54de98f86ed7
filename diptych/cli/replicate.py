"""Measure a paper's claims: control and treatment at equal budget over several seeds, with a verdict."""
import argparse
from pathlib import Path

from diptych import replication
from diptych.cli import common


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help=f"a study: {', '.join(replication.names()) or 'none yet'}")
    parser.add_argument("--run", type=Path, metavar="FOLDER",
                        help="where trainings and results go; what is there is not done again "
                             "(default: runs/replicate/NAME)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the page goes (default: the run's folder)")
    parser.add_argument("--seeds", type=_seeds, metavar="N,N,...", help="(default: the study's, at least three)")
    parser.add_argument("--quick", action="store_true", help="one seed, a few steps: shows that it runs, no more")
    parser.add_argument("--measure-again", action="store_true", help="of what is trained, where measuring has changed")
    parser.add_argument("--ledger", action="store_true", help="write the ledger entry claim-NAME")
    parser.add_argument("--replace", action="store_true", help="with --ledger: an existing entry is replaced")
    common.add_device(parser)


def _seeds(text: str) -> tuple[int, ...]:
    found = tuple(int(part) for part in text.split(","))
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"expected different seeds, got {text}")
    return found


def run(args: argparse.Namespace) -> int:
    study = replication.find(args.name)
    if args.quick and args.ledger:
        raise ValueError("expected a full run for the ledger, got --quick; fix: leave it away")
    device = common.set_up_device(args)
    from diptych.replication import page, runner

    folder = args.run or Path("runs/replicate") / (args.name + ("-quick" if args.quick else ""))
    outcome = runner.run(study, folder, seeds=args.seeds, quick=args.quick, device=str(device),
                         again=args.measure_again)
    rows = [(f.claim.text, page.shown(f.effect), page.asked(f), f.verdict) for f in outcome.findings()]
    print(common.table(rows, ("claim", "effect", "asked for", "verdict")))
    written = page.write(outcome, args.out or folder)
    if args.ledger:
        from diptych.ledger import entry, write_entry

        print(write_entry(outcome.entry(), entry.ENTRIES, replace=args.replace))
    print(written)
    return 0
