import math
import random

import pytest
import torch

from diptych.objectives.next_token import TextSampling, cross_entropy, draw, log_probs


def brute_force(logits: list[float], s: TextSampling) -> tuple[list[float], float]:
    """Probabilities by the definition: sort, keep k, keep the smallest head whose mass reaches p, renormalise. Also
    how near p came to the edge between two tokens, where rounding decides."""
    weights = [math.exp((x - max(logits)) / s.temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -weights[i])
    order = order[: s.top_k] if s.top_k else order
    total, mass, head, edge = sum(weights[i] for i in order), 0.0, [], 1.0
    for i in order:
        edge = min(edge, abs(mass / total - s.top_p)) if s.top_p < 1 else edge
        if mass / total >= s.top_p:
            break
        head.append(i)
        mass += weights[i]
    return [weights[i] / mass if i in head else 0.0 for i in range(len(logits))], edge


def test_distribution_equals_its_definition() -> None:
    rng, compared = random.Random(0), 0
    for _ in range(400):
        logits = [rng.uniform(-4, 4) for _ in range(rng.randint(1, 12))]
        sampling = TextSampling(temperature=rng.uniform(0.2, 3), top_k=rng.choice([0, 1, 3, 8, 50]),
                                top_p=rng.choice([1.0, rng.uniform(0.05, 1)]))
        probabilities = log_probs(torch.tensor(logits), sampling).exp()
        assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
        expected, edge = brute_force(logits, sampling)
        if edge > 1e-5:
            assert probabilities.tolist() == pytest.approx(expected, abs=1e-5)
            compared += 1
    assert compared > 390


def test_cuts_on_a_known_distribution() -> None:
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()

    def kept(**changes: float) -> list[float]:
        sampling = TextSampling(temperature=1.0, **changes)  # type: ignore[arg-type]
        return [round(p, 4) for p in log_probs(logits, sampling).exp().tolist()]

    assert kept() == [0.1, 0.4, 0.3, 0.2]
    assert kept(top_k=2) == [0, 0.5714, 0.4286, 0]
    assert kept(top_k=99) == kept()
    assert kept(top_p=0.39) == [0, 1, 0, 0]
    assert kept(top_p=0.41) == [0, 0.5714, 0.4286, 0]  # the token that crosses p stays
    assert kept(top_p=0.75) == [0, 0.4444, 0.3333, 0.2222]
    assert kept(top_k=3, top_p=0.5) == [0, 0.5714, 0.4286, 0]  # p counts within the k


def test_temperature_sharpens() -> None:
    logits = torch.tensor([1.0, 2.0])
    cold = log_probs(logits, TextSampling(temperature=0.5))
    torch.testing.assert_close(cold, (logits * 2).log_softmax(0))
    # greedy decoding scores with the plain distribution, as training does
    torch.testing.assert_close(log_probs(logits, TextSampling(top_k=1)), logits.log_softmax(0))


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.tensor([0.0, 3.0, 3.0, 1.0])
    assert draw(logits, TextSampling(), torch.Generator().manual_seed(0)) == 1


def test_draws_have_the_right_frequencies() -> None:
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0, -0.4, 0.9])
    sampling = TextSampling(temperature=0.8, top_k=5, top_p=0.97)
    expected = log_probs(logits, sampling).exp()
    g, count = torch.Generator().manual_seed(0), 4000
    drawn = [draw(logits, sampling, g) for _ in range(count)]
    seen = torch.bincount(torch.tensor(drawn), minlength=6)
    allowed = expected > 0
    assert seen[~allowed].sum() == 0
    chi = ((seen - count * expected)[allowed].square() / (count * expected[allowed])).sum()
    assert chi < 18.5  # 0.1% quantile of 4 degrees of freedom


def test_draws_repeat_with_the_seed() -> None:
    logits, sampling = torch.randn(50), TextSampling(temperature=1.0)
    first, second = ([draw(logits, sampling, g) for _ in range(20)]
                     for g in (torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)))
    assert first == second and len(set(first)) > 5


def test_no_draw_leaves_the_support(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 probabilities of a large vocabulary may sum to less than the uniform number."""
    logits = torch.full((200_000,), -1e9)
    logits[7:150_007] = torch.randn(150_000, generator=torch.Generator().manual_seed(0))
    for value, expected in ((1 - 2**-53, range(150_000, 150_007)), (0.0, range(7, 8))):
        uniform = torch.tensor(value, dtype=torch.float64)
        monkeypatch.setattr(torch, "rand", lambda *size, uniform=uniform, **kwargs: uniform)
        assert draw(logits, TextSampling(temperature=1.0), torch.Generator()) in expected


def test_cross_entropy_is_float32() -> None:
    logits, labels = torch.randn(6, 9), torch.tensor([0, 8, 3, 3, 1, 2])
    expected = -logits.log_softmax(1)[torch.arange(6), labels]
    torch.testing.assert_close(cross_entropy(logits, labels), expected)
    assert cross_entropy(logits.bfloat16(), labels).dtype == torch.float32


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1},
                                 {"max_tokens": 0}])
def test_impossible_settings_are_errors(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected temperature >= 0"):
        TextSampling(**bad)  # type: ignore[arg-type]
