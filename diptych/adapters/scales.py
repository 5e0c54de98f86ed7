"""What the adapters of next-scale models share: names of the transformer's tensors, and driving the sampler.

Published rotary pairs are neighbouring channels, ours are half a head apart; queries and keys both, which changes no
score.
"""
from collections.abc import Callable, Generator, Mapping, Sequence

import torch
from torch import Tensor

from diptych.adapters.cases import Case
from diptych.adapters.keys import Rule, expand
from diptych.objectives.next_scale import Ask, Step
from diptych.parts.scales import Past, ScaleConfig, ScaleTransformer

BOTH = ("weight", "bias")


def decoder_rules(c: ScaleConfig, blocks: Sequence[str], attention: str, *, prefix: str = "",
                  ours: str = "decoder.") -> list[Rule]:
    """`blocks`: the published name of every block, dot included; `attention`: that of its self-attention."""
    one = {"word_embed": "word", "head": "head", "head_nm.ada_lin.1": "head_modulation.1"}
    many = {f"{attention}.proj": "attention.out", "ffn.fc1": "mlp.up", "ffn.fc2": "mlp.down"}
    out = [Rule((prefix + "pos_start",), ours + "first", shape=(1, 1, c.width)),
           Rule((prefix + "lvl_embed.weight",), ours + "level.weight")]
    turned = c.positions == "rotary"
    query = {"mat_qkv.weight": ("qkv.weight", 3), "q_bias": ("q_bias", 1)}
    own: list[tuple[str, str, tuple[int, ...]]] = [(f"{attention}.v_bias", "attention.v_bias", ())]
    if c.unit:
        own.append((f"{attention}.scale_mul_1H11", "attention.factor", (1, c.heads, 1, 1)))
    if c.positions == "table":
        out.append(Rule((prefix + "pos_1LC",), ours + "table", shape=(1, sum(r * n for r, n in c.scales), c.width)))
    if c.shared:
        one["shared_ada_lin.1"] = "modulation.1"
        own.append(("ada_gss", "offset", (1, 1, 6, c.width)))
    else:
        many["ada_lin.1"] = "modulation.1"
    if c.memory:
        many |= {"ca.mat_q": "cross_query", "ca.proj": "cross.out", "ca_norm": "cross_norm"}
        own += [("ca.mat_kv.weight", "cross.kv.weight", ()), ("ca.v_bias", "cross.v_bias", ())]
    for theirs, mine in one.items():
        out += expand(Rule((f"{prefix}{theirs}.{{w}}",), f"{ours}{mine}.{{w}}"), w=BOTH)
    for i, block in enumerate(blocks):
        home = f"{ours}blocks.{i}."
        out += [Rule((prefix + block + theirs,), home + mine, shape=shape) for theirs, mine, shape in own]
        out += [Rule((f"{prefix}{block}{attention}.{theirs}",), f"{home}attention.{mine}",
                     rotary=(parts, c.heads) if turned else None) for theirs, (mine, parts) in query.items()]
        for theirs, mine in many.items():
            out += expand(Rule((f"{prefix}{block}{theirs}.{{w}}",), f"{home}{mine}.{{w}}"), w=BOTH)
    return out


def constants(theirs: Mapping[str, Tensor]) -> list[str]:
    """Published tensors that hold nothing learnt: keys have no bias."""
    return [name for name in theirs if name.endswith("zero_k_bias")]


def run(sampler: Generator[Ask, Mapping[str, Tensor], list[Step]], logits_of: Callable[[Ask], Tensor]
        ) -> tuple[list[Step], list[Tensor]]:
    """A picture drawn with a network that gives the logits of its contexts, "full" and then "null", stacked: the steps
    and all logits."""
    told: list[Tensor] = []
    try:
        ask = next(sampler)
        while True:
            told.append(logits_of(ask))
            ask = sampler.send(dict(zip(("full", "null"), told[-1], strict=False)))
    except StopIteration as stop:
        return stop.value, told


def by_context(rows: Sequence[Tensor]) -> Tensor:
    """Logits (contexts, n, ...) of several pictures as they are stored: all of the first context, then the others."""
    return torch.stack(list(rows), 1).flatten(0, 1)


def compare(name: str, own: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float, logits: float,
            loose: Mapping[str, float] | None = None) -> list[Case]:
    """Outputs of one case; `loose` are tolerances of their own, integers must be equal."""
    def bound(key: str, value: Tensor) -> float:
        if loose and key in loose:
            return loose[key]
        return (logits if "logits" in key else tolerance) if value.is_floating_point() else 0.0

    return [Case.compare(f"{name}.{k}", v, wanted[k], bound(k, v)) for k, v in own.items()]


def case_tensors(name: str, golden: Mapping[str, Tensor], side: str) -> dict[str, Tensor]:
    """The inputs or outputs of one case by their names in it."""
    start = f"{name}.{side}."
    return {k.removeprefix(start): v for k, v in golden.items() if k.startswith(start)}


def with_null(decoder: ScaleTransformer, condition: Tensor, *memory: Tensor) -> Callable[[Ask], Tensor]:
    """What answers the sampler of one picture: logits of the two rows of `condition`, the text or class and none."""
    past: list[Past] = [(), ()]

    def logits_of(ask: Ask) -> Tensor:
        inputs = None if ask.inputs is None else ask.inputs.expand(2, -1, -1)
        x = decoder.enter(inputs, None if ask.scale else condition)
        logits, past[:] = decoder.step(x, condition, decoder.config.scales, ask.scale, past, *memory)
        return logits

    return logits_of
