"""Masked diffusion of texts: what is hidden, the bound, blocks and their steps, the sampler against plain loops."""
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diptych.objectives import masked_diffusion, masked_token
from diptych.objectives.next_token import TextSampling, TokenSampling

MASK = 3  # an id among those of words
GREEDY, WARM = TokenSampling(temperature=0.0), TokenSampling(temperature=0.7)


def logits(tokens: int, seed: int = 0, values: int = 9) -> Tensor:
    out = 3 * torch.randn((tokens, values), generator=torch.Generator().manual_seed(seed))
    out[:, MASK] = -30  # nobody says the mask
    return out


def run(chain: Any, said: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The result of a sampler that is told these logits, and what it asked for."""
    asked = [next(chain)[0]]
    for k, answer in enumerate(said):
        try:
            asked.append(chain.send(answer)[0])
        except StopIteration as stop:
            assert k + 1 == len(said), "fewer questions than answers"
            return stop.value, asked
    raise AssertionError("more questions than answers")


# -- training ---------------------------------------------------------------------------------------------------------

def test_every_token_is_hidden_by_itself() -> None:
    texts = [torch.arange(400) % 3, torch.arange(400) % 3 + 4]
    generator = torch.Generator().manual_seed(0)
    shares, rates = [], []
    for _ in range(40):
        shown, hidden, p = masked_diffusion.corrupt(texts, MASK, generator)
        assert (shown[hidden] == MASK).all() and torch.equal(shown[~hidden], torch.cat(texts)[~hidden])
        assert len(p.unique()) == 2 and p[:400].unique().numel() == 1  # a probability for each text
        shares += [hidden[:400].float().mean(), hidden[400:].float().mean()]
        rates += [p[0], p[-1]]
    assert (torch.stack(shares) - torch.stack(rates)).abs().max() < 0.1
    assert torch.stack(rates).std() > 0.2 and float(masked_diffusion.mask_probability(torch.tensor(0.0))) > 0
    _, hidden, p = masked_diffusion.corrupt(texts, MASK, generator, p=0.25)
    assert (p == 0.25).all() and abs(float(hidden.float().mean()) - 0.25) < 0.05


def test_the_loss_is_an_unbiased_bound() -> None:
    """Of a network that does not look at what it is shown, it is the log-likelihood itself, on average over p."""
    tokens, scores = torch.randint(0, 9, (50,), generator=torch.Generator().manual_seed(1)), logits(50)
    plain = -scores.log_softmax(-1).gather(1, tokens[:, None]).sum()
    generator, found = torch.Generator().manual_seed(2), []
    for p in (0.1, 0.5, 1.0):
        for _ in range(300):
            _, hidden, rate = masked_diffusion.corrupt([tokens], MASK, generator, p=p)
            found.append(masked_diffusion.loss(scores[hidden], tokens[hidden], rate[hidden]).sum())
    assert float(torch.stack(found).mean()) == pytest.approx(float(plain), rel=0.05)


# -- sampling ---------------------------------------------------------------------------------------------------------

def test_blocks_and_their_steps() -> None:
    assert masked_diffusion.plan(8, 4, 6) == [(slice(0, 4), 3), (slice(4, 8), 3)]
    assert masked_diffusion.plan(8, None, 5) == [(slice(0, 8), 5)]
    assert masked_diffusion.plan(10, 4, 7) == [(slice(0, 4), 3), (slice(4, 8), 2), (slice(8, 10), 2)]
    assert [n for _, n in masked_diffusion.plan(12, 3, 1)] == [1, 1, 1, 1]  # each has one at least
    assert masked_diffusion.quotas(8, 3) == [3, 3, 2] and masked_diffusion.quotas(2, 4) == [1, 1, 0, 0]


@pytest.mark.parametrize("order", ["sure", "random"])
def test_steps_against_plain_loops(order: str) -> None:
    tokens, blocks = 7, masked_diffusion.plan(7, 4, 5)
    said = [logits(tokens, seed=k) for k in range(5)]
    uniforms, sure = torch.rand((2, 5, tokens), generator=torch.Generator().manual_seed(9))
    start = torch.tensor([MASK, 5, *[MASK] * 5])
    chain = masked_diffusion.fill(start, MASK, blocks, WARM, uniforms, sure if order == "random" else None)
    found, asked = run(chain, said)
    x = start.tolist()
    steps = [((0, 4), n) for n in (1, 1, 1)] + [((4, 7), n) for n in (2, 1)]
    for k, ((low, high), count) in enumerate(steps):
        assert asked[k].tolist() == x
        drawn, certain = {}, {}
        for i in range(low, high):
            if x[i] == MASK:
                heated = (said[k][i].double() / 0.7).softmax(-1)
                drawn[i] = int((heated.cumsum(0) <= uniforms[k, i]).sum())
                plain = said[k][i].double().softmax(-1)[drawn[i]]
                certain[i] = float(plain) if order == "sure" else float(sure[k, i])
        for i in sorted(certain, key=certain.__getitem__, reverse=True)[:count]:
            x[i] = drawn[i]
    assert found.tolist() == x and MASK not in x and x[1] == 5


def test_gumbel_noise_draws_from_the_same_distribution() -> None:
    scores = logits(1).expand(4000, -1)
    generator = torch.Generator().manual_seed(0)
    one = masked_diffusion.draw(scores, WARM, torch.rand(4000, generator=generator))
    two = masked_diffusion.draw(scores, WARM, torch.rand((4000, 9), generator=generator, dtype=torch.float64))
    shares = [torch.bincount(x, minlength=9) / 4000 for x in (one, two)]
    torch.testing.assert_close(shares[0], (scores[0] / 0.7).softmax(-1), atol=0.03, rtol=0)
    torch.testing.assert_close(shares[1], shares[0], atol=0.03, rtol=0)
    assert (masked_diffusion.draw(scores, GREEDY, torch.rand(4000)) == scores[0].argmax()).all()


def test_a_finished_block_may_end_it() -> None:
    said = [logits(6, seed=k) for k in range(2)]
    wanted = said[1].argmax(-1)
    said[0][:2], end = said[1][:2], int(wanted[1])
    chain = masked_diffusion.fill(torch.full((6,), MASK), MASK, masked_diffusion.plan(6, 2, 3), GREEDY,
                                  done=lambda block: int(block[-1]) == end)
    found, _ = run(chain, said[:1])
    assert torch.equal(found[:2], wanted[:2]) and (found[2:] == MASK).all()


def test_the_log_prob_of_what_a_step_reveals() -> None:
    said, log = [logits(6, seed=k) for k in range(3)], [torch.full((6,), MASK)]
    run(masked_diffusion.fill(log[0], MASK, masked_diffusion.plan(6, None, 3), GREEDY, log=log), said)
    total = 0.0
    for scores, before, after in zip(said, log[:-1], log[1:], strict=True):
        own = masked_token.log_prob(scores.log_softmax(-1), before, after, MASK)
        changed = before != after
        assert len(own) == 2 and own.tolist() == pytest.approx(
            scores.log_softmax(-1)[changed, after[changed]].tolist())
        total += float(own.sum())
    assert math.isfinite(total) and total < 0


def test_options_that_cannot_work_are_errors() -> None:
    for steps, block in ((0, 1), (1, -1)):
        with pytest.raises(ValueError, match="steps and block >= 1"):
            TextSampling(steps=steps, block=block)
    with pytest.raises(ValueError, match="order sure or random"):
        TextSampling(order="left")  # type: ignore[arg-type]
