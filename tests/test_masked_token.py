"""Masked tokens: what is hidden, the schedules of both variants, a step against plain loops, its log-prob."""
import math

import pytest
import torch

from diptych.objectives import masked_token
from diptych.objectives.masked_token import Step
from diptych.objectives.next_token import TokenSampling


def test_the_share_of_hidden_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand((400, 50), generator=generator)
    t = torch.linspace(0, 1, 400)
    hidden = masked_token.hide(t, uniforms)
    wanted = [max(1, round(50 * math.cos(math.pi * float(v) / 2))) for v in t]
    assert (hidden.sum(-1) - torch.tensor(wanted)).abs().max() <= 1  # where float32 rounds the other way
    assert hidden[0].all() and hidden[-1].sum() == 1
    assert hidden[:200].float().mean(0).std() < 0.05  # no place is preferred
    codes = torch.arange(50).expand(400, 50)
    shown = masked_token.cover(codes, hidden, 50)
    assert (shown[hidden] == 50).all() and (shown[~hidden] == codes[~hidden]).all()


def test_training_asks_for_hidden_codes_in_their_place() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    codes = torch.tensor([0, 6, 3, 3, 1])
    expected = torch.stack([row.logsumexp(0) - row[c] for row, c in zip(logits, codes, strict=True)])
    torch.testing.assert_close(masked_token.loss(logits, codes), expected)


def test_pictures_are_hidden_apart_and_clean_ones_not_at_all() -> None:
    blocks = [torch.arange(20) % 7 for _ in range(3)]
    drawn = [True, False, True]
    shown, hidden = masked_token.corrupt(blocks, drawn, 7, torch.Generator().manual_seed(4))
    parts = shown.split(20)
    assert len(hidden) == 40 and torch.equal(parts[1], blocks[1])
    for part, own in zip((parts[0], parts[2]), hidden.split(20), strict=True):
        assert torch.equal(part == 7, own) and torch.equal(part[~own], blocks[0][~own])
    assert hidden[:20].sum() != hidden[20:].sum()
    half = masked_token.corrupt(blocks, drawn, 7, torch.Generator().manual_seed(4), share=0.5)[1]
    assert half[:20].sum() == half[20:].sum() == 10
    assert torch.equal(half, masked_token.corrupt(blocks, drawn, 7, torch.Generator().manual_seed(4), share=0.5)[1])


def test_the_sampler_asks_with_what_it_has() -> None:
    """It tells the share that is known and what was drawn, and keeps codes that are given."""
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor([7, 2, 7, 7, 7, 7, 5, 7])
    uniforms = torch.rand((2, 3, 8), generator=generator)
    log: list[Step] = []
    chain = masked_token.fill(x, uniforms[0], uniforms[1], 7, TokenSampling(), 1.0, log=log)
    asked, known, drawn = next(chain)
    assert torch.equal(asked, x) and known == 0.25 and drawn is None
    try:
        while True:
            asked, share, drawn = chain.send(torch.randn((8, 7), generator=generator))
            assert share > known and torch.equal(asked, log[-1].codes(7))
            assert drawn is not None and torch.equal(drawn, log[-1].drawn)
            known = share
    except StopIteration as stop:
        assert torch.equal(stop.value, log[-1].drawn) and len(log) == 3
        assert (stop.value < 7).all() and stop.value[1] == 2 and stop.value[6] == 5


def test_schedules_of_both_variants() -> None:
    assert masked_token.schedule(16, 16, 4, "paper") == [14, 11, 6, 1]
    assert masked_token.schedule(16, 6, 4, "paper") == [5, 4, 3, 1]  # few to draw: one fewer every time
    assert masked_token.schedule(256, 256, 3, "paper")[1] == 128
    assert masked_token.schedule(256, 256, 3, "released")[1] == 127  # the float32 cosine is just below a half
    for variant in ("paper", "released"):
        for tokens, steps in ((64, 12), (9, 20), (1, 1)):
            counts = masked_token.schedule(tokens, tokens, steps, variant)
            assert len(counts) == steps and counts == sorted(counts, reverse=True) and counts[-1] == 1
    with pytest.raises(ValueError, match="at least 1 step"):
        masked_token.schedule(4, 4, 0)


def test_the_order_cools_down() -> None:
    assert masked_token.temperatures(2.0, 4, "paper") == pytest.approx([1.5, 1.0, 0.5, 0.0])
    assert masked_token.temperatures(2.0, 4, "released") == pytest.approx([1.5, 0.75, 0.1875, 0.0])


def test_gumbel_noise() -> None:
    noise = masked_token.gumbel(torch.rand(200_000, generator=torch.Generator().manual_seed(0)))
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.05)
    assert torch.isfinite(masked_token.gumbel(torch.tensor([0.0, 1 - 2**-24]))).all()


def steps(values: int = 5, tokens: int = 8, total: int = 4) -> list[tuple[torch.Tensor, torch.Tensor, Step]]:
    """(log-probs, codes before, step) of a drawing from random logits; three codes are given."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.full((tokens,), values)
    codes[:3] = torch.tensor([4, 0, 2])
    out = []
    for left, heat in zip(masked_token.schedule(tokens, tokens - 3, total), masked_token.temperatures(1.0, total),
                          strict=True):
        scores = torch.randn((tokens, values), generator=generator).log_softmax(-1)
        uniforms, order = torch.rand((2, tokens), generator=generator)
        step = masked_token.reveal(scores, codes, uniforms, masked_token.gumbel(order), left, heat)
        out.append((scores, codes, step))
        expected, sure = codes.tolist(), {}
        for i in range(tokens):
            if codes[i] == values:
                expected[i] = int((scores[i].exp().cumsum(0) <= uniforms[i]).sum())
                sure[i] = float(scores[i, expected[i]] + heat * masked_token.gumbel(order[i]))
        assert step.drawn.tolist() == expected
        hidden = sorted(sure, key=sure.__getitem__)[:left]
        assert step.remasked.nonzero().flatten().tolist() == sorted(hidden)
        codes = step.codes(values)
    return out


def test_steps_against_plain_loops() -> None:
    """Every code keeps its value from the step that revealed it on; given ones are never touched."""
    done = steps()
    last = done[-1][2].drawn
    assert last[:3].tolist() == [4, 0, 2] and (last < 5).all()
    for _, before, _ in done:
        assert (last[before < 5] == before[before < 5]).all()


def test_greedy_draws_take_the_likeliest() -> None:
    scores = torch.randn((6, 4), generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    step = masked_token.reveal(scores, torch.full((6,), 4), None, torch.zeros(6), 2, 0.0)
    assert torch.equal(step.drawn, scores.argmax(-1))
    kept, gone = (scores.amax(-1)[m] for m in (~step.remasked, step.remasked))
    assert len(gone) == 2 and kept.min() > gone.max()


def test_the_log_prob_of_what_a_step_reveals() -> None:
    for number, (scores, before, step) in enumerate(done := steps()):
        after = step.codes(5) if number + 1 < len(done) else step.drawn
        own = masked_token.log_prob(scores, before, after)
        revealed = [i for i in range(8) if before[i] == 5 and after[i] != 5]
        assert own.tolist() == pytest.approx([float(scores[i, after[i]]) for i in revealed])
    assert sum(len(masked_token.log_prob(s, b, d.drawn)) >= 1 for s, b, d in done) == len(done)
