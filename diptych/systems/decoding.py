"""Token by token without the general machinery: while nothing but single tokens joins a few contexts, a step is one
call of `parts.decode`. Positions are known before the tokens are; a context learns of what it has read at the end.

`Decoding.of(system)` is None where that is not possible (another device, a mask or network of its own, no compiler),
and everything is then read the usual way.
"""
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from diptych.objectives import next_token
from diptych.objectives.decisions import ahead
from diptych.parts import decode
from diptych.parts.decode import Chain, Decoder, Fingerprint, fingerprint
from diptych.parts.interleave import Frame, Writer
from diptych.parts.masks import interleaved, packed_causal
from diptych.parts.tokens import Mode, assemble
from diptych.parts.trunks import Trunk
from diptych.systems.base import Emit, Event, Sampling, Work, notes
from diptych.systems.hooks import altered
from diptych.systems.works import Read, Reader, Step

if TYPE_CHECKING:
    from diptych.systems.coded import Coded
    from diptych.systems.packed import Packed

AHEAD = 64  # words that a context makes room for at once
PARTIAL_CHARACTER = "\ufffd"  # what the bytes of an unfinished character decode to
LARGEST_TABLE = 1 << 28  # bytes
_made: "WeakKeyDictionary[Packed, dict[bool, tuple[Fingerprint, Decoding | None]]]" = WeakKeyDictionary()


class Trail:
    """The next `count` tokens of one context, of which only what they hold is not known yet. `write` writes n of them
    (what ids they have does not matter)."""

    def __init__(self, decoding: "Decoding", decoder: Decoder, reader: Reader, write: Callable[[int], Writer],
                 count: int) -> None:
        self.decoding, self.decoder, self.reader, self.write, self.count = decoding, decoder, reader, write, count
        self.done = 0
        tokens = assemble([[write(count).strip]], start=[reader.context.length])
        self.angles = torch.stack(decoder.rope(tokens), 2)[0]  # (count, 2, pairs)
        reader.context.reserve(count)

    def settle(self) -> None:
        """Let the reader know what it has read."""
        if self.done:
            w, context = self.write(self.done), self.reader.context
            context.note(assemble([[w.strip]], start=[context.length - self.done]))
            self.reader.position, self.reader.segment = w.position, w.segment
        self.count -= self.done
        self.done = 0


class Decoding:
    """What a system decodes with; made anew when its weights change."""

    def __init__(self, system: "Packed", decoders: dict[int, Decoder], words: Chain, codes: Chain | None) -> None:
        self.decoders, self.words, self.codes = decoders, words, codes
        self.words_in = system.embed.weight.detach()
        self.codes_in = _table(system, codes.rows) if codes else None

    @classmethod
    def of(cls, system: "Packed") -> "Decoding | None":
        if _watched(system):
            return None
        known, marks = _made.setdefault(system, {}), fingerprint(system)
        if system.int8 not in known or known[system.int8][0] != marks:
            known[system.int8] = marks, cls._of(system)
        return known[system.int8][1]

    @classmethod
    def now(cls, system: "Packed") -> "Decoding | None":
        """`of`, unless gradients are wanted; asked once for all programs that are finished together."""
        if torch.is_grad_enabled():
            return None
        page = notes(system)
        if cls not in page:
            page[cls] = cls.of(system)
        return page[cls]

    @classmethod
    def _of(cls, system: "Packed") -> "Decoding | None":
        if not system.plain or system.mask not in (packed_causal, interleaved):
            return None
        words = Chain.of(system.head, system.int8)
        alike = len(system.trunk.groups) == 1
        routes = range(1 if alike else system.trunk.coupling.given)
        decoders = {r: d for r in routes if (d := Decoder.of(system.trunk, r, system.int8)) is not None}
        if words is None or not decoders:
            return None
        if alike:
            decoders = dict.fromkeys(range(system.trunk.coupling.given), decoders[0])
        head = system.drawing_head()
        return cls(system, decoders, words, None if head is None else Chain.of(head, system.int8))

    def trail(self, reader: Reader, write: Callable[[int], Writer], count: int) -> Trail | None:
        """For the next `count` tokens; None if they are not all alike, or of a kind that this cannot decode."""
        if reader.context.store is None:
            return None
        strip = write(count).strip.arrays()
        decoder, *others = {self.decoders.get(r) for r in strip["route"].tolist()}
        if others or decoder is None or not (strip["mode"] == Mode.CAUSAL).all():
            return None
        return Trail(self, decoder, reader, write, count)

    def code_state(self, system: "Coded", code: Tensor) -> Tensor:
        """The input (width,) of a code ()."""
        return system.code_tokens(code[None])[0] if self.codes_in is None else self.codes_in[code]

    def run(self, works: Sequence[Step]) -> list[Tensor]:
        """All at once; contexts are as before, but for what lies behind their ends."""
        rows = [(t, w, n) for n, w in enumerate(works) for t in w.trails]
        rows.sort(key=lambda row: (id(row[0].decoder), row[1].codes))
        hidden: list[Tensor] = []
        for decoder in {id(t.decoder): t.decoder for t, *_ in rows}.values():
            own = [(t, w) for t, w, _ in rows if t.decoder is decoder]
            states = torch.stack([w.state for _, w in own]).float()
            angles = torch.stack([t.angles[t.done] for t, _ in own])
            hidden.append(decoder.step(states, (angles[:, 0], angles[:, 1]), [t.reader.context for t, _ in own]))
        out = torch.cat(hidden) if len(hidden) > 1 else hidden[0]
        for i, (_, work, _) in enumerate(rows):
            if work.states is not None:
                work.states.append(out[i : i + 1])
        answers: dict[int, list[Tensor]] = {n: [] for n in range(len(works))}
        for codes in (False, True):
            places = [i for i, (_, w, _) in enumerate(rows) if w.codes == codes]
            head = self.codes if codes else self.words
            if places and head is not None:
                logits = head(out if len(places) == len(rows) else out[places].contiguous())
                for i, row in zip(places, logits, strict=True):
                    answers[rows[i][2]].append(row)
        return [torch.stack(answers[n])[:, None] for n in range(len(works))]

    @staticmethod
    def run_all(works: Sequence[Step]) -> list[Tensor]:
        """Also where some began before the weights changed."""
        answers: dict[int, Tensor] = {}
        for decoding in {id(w.trails[0].decoding): w.trails[0].decoding for w in works}.values():
            own = [n for n, w in enumerate(works) if w.trails[0].decoding is decoding]
            answers |= zip(own, decoding.run([works[n] for n in own]), strict=True)
        return [answers[n] for n in range(len(works))]

    @staticmethod
    def advance(works: Sequence[Step]) -> None:
        for w in works:
            for t in w.trails:
                t.done += 1
                t.reader.context.length += 1


def say(system: "Packed", reader: Reader, index: int, frame: Frame, sampling: Sampling, generator: torch.Generator,
        emit: Emit, more: bool) -> Generator[Work, Any, list[int]]:
    """Decode a text span; its last token and the closing mark are read only if more follows."""
    ids, shown, told = list[int](), "", 0
    w = system.writer(reader)
    w.text([], frame=frame, close=False)
    decoding = Decoding.now(system)
    trail: Trail | None = None
    known = [int(token) for token in ahead("text")[: sampling.text.max_tokens]]
    known = known[: known.index(system.marks.end) + 1] if system.marks.end in known else known
    rows = torch.empty(0)
    if known:  # one pass answers for all of them
        w.text(known[:-1], open=False, close=False)
        rows = yield Read(reader, w, recite=len(known))
    for count in range(sampling.text.max_tokens):
        new = count > len(known)  # the one before was read by nobody yet, and not with what stands before the text
        if new and decoding and (trail is None or trail.done == trail.count):
            if trail is not None:
                trail.settle()
            trail = decoding.trail(reader, partial(_words, system, reader), AHEAD)
            decoding = decoding if trail else None
        if count < len(known):
            logits = rows[count]
        elif new and decoding and trail:
            logits = (yield Step([trail], decoding.words_in[ids[-1]], codes=False))[0, 0]
        else:
            logits = yield Read(reader, w, predict=True)
        w = system.writer(reader)
        token = next_token.draw(logits, sampling.text, generator)
        if token == system.marks.end:
            break
        ids.append(token)
        w.text([token], open=False, close=False)
        text = system.vocabulary.decode(ids) if system.vocabulary is not None else ""
        if text.startswith(shown) and text != shown and not text.endswith(PARTIAL_CHARACTER):
            emit(Event("text", index, text[len(shown):], len(ids)))
            shown, told = text, len(ids)
    if len(ids) > told:
        emit(Event("text", index, "", len(ids)))
    if more:
        if trail is not None:
            trail.settle()
            unread, w = w.ids, system.writer(reader)
            w.text(unread, open=False, close=False)
        w.text([], open=False)
        yield Read(reader, w)
    return ids


def _words(system: "Packed", reader: Reader, count: int) -> Writer:
    w = system.writer(reader)
    w.text([0] * count, open=False, close=False)
    return w


def _watched(system: "Packed") -> bool:
    """Whether someone counts operations, looks between the layers or at attention, changes what comes in, or asks for
    another precision."""
    return (altered(system) or torch.is_autocast_enabled("cpu") or _len_torch_dispatch_stack() > 0
            or any(m._forward_pre_hooks or not all(map(decode.counts, m._forward_hooks.values()))
                   or (isinstance(m, Trunk) and m.watching is not None) for m in system.modules()))


def _table(system: "Packed", values: int) -> Tensor | None:
    """What `code_tokens` makes of every code, (codes, width); None where that is too much to keep."""
    if values * system.embed.weight.shape[1] * system.embed.weight.itemsize > LARGEST_TABLE:
        return None
    with torch.no_grad():
        return cast("Coded", system).code_tokens(torch.arange(values, device=system.device))
