"""Running suites: items in batches through a system, verdicts one by one into a file, resumable at any moment."""
import contextlib
import dataclasses
import itertools
import logging
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diptych.benchmarks.controls import Control, Filler
from diptych.benchmarks.results import Key, Results
from diptych.benchmarks.suite import Outcome, Suite
from diptych.benchmarks.world import find_suites
from diptych.config import to_dict
from diptych.data.journal import Journal
from diptych.document import Document
from diptych.ledger import Cost
from diptych.systems.base import Sampling, System
from diptych.systems.io import fingerprint
from diptych.world.scene import VERSION

log = logging.getLogger(__name__)

# what happened to one item: key, the true document, the same as the system filled it, the verdict
Watch = Callable[[Key, Document, Document, Outcome], None]


def evaluate(system: Filler, suites: Iterable[str | Suite], n: int = 500, seed: int = 0, batch: int = 64,
             sampling: Sampling | None = None, splits: Sequence[str] = ("test",), *, template: str = "train",
             world: str = "mini", progress: bool = True, resume_file: str | Path | None = None,
             watch: Watch | None = None) -> Results:
    """Items 0 .. n-1 of every suite and split. `template="held_out"` words them as no training document is worded.

    Every answer has its own seed, a function of `seed`, suite, split and item: neither `batch` nor `n` nor the other
    suites change it. With `resume_file` finished items are kept there, one JSON line each, and not run again; the
    file belongs to these settings and this system. `watch` sees every item that is run now, with its documents.
    """
    chosen = find_suites(suites)
    for suite in chosen:
        for split in splits:
            if split not in suite.splits:
                raise ValueError(f"expected a split of {suite.name} ({', '.join(suite.splits)}), got {split!r}")
    if n < 1 or batch < 1 or not splits:
        raise ValueError(f"expected n >= 1, batch >= 1 and a split, got n={n}, batch={batch}, splits={tuple(splits)}")
    settings = {"seed": seed, "template": template, "world": world, "world_version": VERSION,
                "system": name_of(system), "sampling": _sampling(system, sampling)}
    results = Results(suites={s.name: s for s in chosen}, splits=tuple(splits), n=n, settings=settings)
    # takes a pass over all weights, and only a file asks whose they are
    weights = fingerprint(system) if resume_file is not None and isinstance(system, System) else ""
    book = Book(resume_file, results, weights=weights)
    wanted = [(suite, Key(suite.name, split, index, sample)) for suite in chosen for split in splits
              for index in range(n) for sample in range(suite.samples)]
    todo = [(suite, key) for suite, key in wanted if key not in results.outcomes]
    bar = tqdm(total=len(wanted), initial=len(wanted) - len(todo), disable=not progress, unit="item", leave=False)
    with bar:
        for part in _batches(todo, batch):
            bar.set_description(f"{part[0][1].suite}/{part[0][1].split}", refresh=False)
            start = time.perf_counter()
            true = [suite.read(key.index, key.split, template, world) for suite, key in part]
            with counted(system) as flops:
                made = _answers(system, part[0][0], true, sampling, [_seed(seed, key) for _, key in part])
            verdicts = [_judge(suite, t, m) for (suite, _), t, m in zip(part, true, made, strict=True)]
            if isinstance(system, System):  # what an answer costs, the same for all of a batch
                each = {"GFLOP": flops[0] / len(part) / 1e9}
                verdicts = [dataclasses.replace(v, numbers={**v.numbers, **each}) for v in verdicts]
            cost = Cost(flops=flops[0], documents=len(part), seconds=time.perf_counter() - start)
            book.add({key: verdict for (_, key), verdict in zip(part, verdicts, strict=True)}, cost)
            if watch is not None:
                for (_, key), t, m, verdict in zip(part, true, made, verdicts, strict=True):
                    watch(key, t, m, verdict)
            bar.update(len(part))
    return results


def _batches(todo: list[tuple[Suite, Key]], batch: int) -> Iterator[list[tuple[Suite, Key]]]:
    """Of one suite each: equal kinds of work run best together."""
    for _, group in itertools.groupby(todo, lambda item: item[1].suite):
        same = list(group)
        yield from (same[i:i + batch] for i in range(0, len(same), batch))


def _answers(system: Filler, suite: Suite, true: Sequence[Document], sampling: Sampling | None, seeds: Sequence[int]
             ) -> list[Document]:
    made = system.generate([suite.prompt(t) for t in true], sampling, seeds=seeds)
    if suite.follow is None:
        return made
    again = system.generate([suite.follow(m).prompt() for m in made], sampling, seeds=seeds)
    return [Document((*first.pieces, *second.targets), first.task, first.meta)
            for first, second in zip(made, again, strict=True)]


def _judge(suite: Suite, true: Document, made: Document) -> Outcome:
    if any(piece.empty for piece, wanted in zip(made, true, strict=True) if wanted.target):
        return Outcome(right=False, status="missing")
    return suite.score(true, made)


def _seed(seed: int, key: Key) -> int:
    return zlib.crc32(repr((seed, *key)).encode())


def _sampling(system: Filler, sampling: Sampling | None) -> dict[str, Any]:
    if sampling is None and isinstance(system, System):
        sampling = system.default_sampling()
    return {} if sampling is None else to_dict(sampling)


def name_of(system: Filler) -> str:
    return f"control: {system.name}" if isinstance(system, Control) else type(system).__name__


# -- the file of results ----------------------------------------------------------------------------------------------

class Book:
    """Finished items in a journal of the settings: a record per item, and one per batch with its cost."""

    def __init__(self, path: str | Path | None, results: Results, weights: str) -> None:
        self.results, self.journal = results, None
        if path is None:
            return
        head = {"settings": results.settings, "weights": weights}
        self.journal = Journal(path, head, "results of this system with these settings")
        known, kept = {(s, split) for s in results.suites for split in results.splits}, 0
        for row in self.journal.rows:
            if "cost" in row:
                results.add_cost(Cost(**row["cost"]))
                continue
            key = Key(*row["key"])
            if (key.suite, key.split) in known and key.index < results.n:
                results.outcomes[key] = Outcome.from_dict(row["outcome"])
                kept += 1
        if self.journal.rows:
            log.info("%s: %d items are done", path, kept)

    def add(self, outcomes: dict[Key, Outcome], cost: Cost) -> None:
        if self.journal is not None:
            self.journal.add([*({"key": list(key), "outcome": o.to_dict()} for key, o in outcomes.items()),
                              {"cost": to_dict(cost)}])
        self.results.outcomes.update(outcomes)
        self.results.add_cost(cost)


# -- cost -------------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def counted(system: Filler) -> Iterator[list[float]]:
    """Counts the FLOPs of linear and convolution layers into the one number of the list. Attention products, norms
    and lookups are not in it: a few per cent at these lengths."""
    total = [0.0]
    if not isinstance(system, System):
        yield total
        return
    from torch import nn

    from diptych.parts import decode

    @decode.counting
    def count(layer: Any, _: Any, out: Any) -> None:
        weight = layer.weight
        total[0] += 2.0 * out.numel() * weight.numel() / weight.shape[0]

    handles = [m.register_forward_hook(count) for m in system.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    try:
        with decode.tallied(total):
            yield total
    finally:
        for handle in handles:
            handle.remove()


def taking_part(system: System, document: Document) -> int:
    """How many parameters take part in filling a document: experts, layers and heads that stay idle do not count."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    sizes = {p.untyped_storage().data_ptr(): p.numel() for p in system.parameters()}
    seen: set[int] = set()

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for value in tree_leaves((args, kwargs)):
                # views share the storage: a layer that reads a part of a weight takes part with all of it
                if hasattr(value, "untyped_storage"):
                    seen.add(value.untyped_storage().data_ptr())
            return func(*args, **(kwargs or {}))

    with Watching():
        system.generate([document.prompt()])
    return sum(size for place, size in sizes.items() if place in seen)
