"""Preference losses: formulas, what the reference changes, noise that pairs share, published outputs."""
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diptych.adapters import parity
from diptych.alignment.preference import Pair, Preference, code_log_prob, error_log_prob, odds_loss, shared

GOLDEN = Path(__file__).parent / "goldens" / "dpo-visual"
POLICY = Pair(torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -2.5]))
REFERENCE = Pair(torch.tensor([-1.2, -2.0]), torch.tensor([-1.5, -2.7]))
H = torch.tensor([0.7, -1.2])  # how much more the policy prefers than the reference


def test_all_published_outputs_are_reproduced() -> None:
    cases = parity.run("dpo-visual", GOLDEN)
    assert all(c.passed for c in cases), parity.table(cases)
    stored = {k.replace(".output", "") for k in load_file(GOLDEN / "golden.safetensors") if ".output" in k}
    assert stored <= {c.name for c in cases} and len(stored) == 43
    assert max(c.relative for c in cases) < 1e-6


def test_an_unknown_case_is_an_error(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "g"))
    tensors = load_file(folder / "golden.safetensors")
    save_file({**tensors, "video.output.loss": torch.zeros(())}, folder / "golden.safetensors")
    with pytest.raises(ValueError, match="of a known case, got video.output.loss"):
        parity.run("dpo-visual", folder)


def test_losses_are_those_of_the_papers() -> None:
    sigmoid = torch.nn.functional.logsigmoid
    expected = {"sigmoid": -sigmoid(0.5 * H), "hinge": (1 - 0.5 * H).clamp_min(0), "ipo": (H - 1).square()}
    for kind, value in expected.items():
        found = Preference(kind=kind, beta=0.5)(POLICY, REFERENCE)  # type: ignore[arg-type]
        torch.testing.assert_close(found.losses, value)
        torch.testing.assert_close(found.chosen - found.rejected, 0.5 * H)
        assert found.accuracy == 0.5 and float(found.margin) == pytest.approx(0.5 * float(H.mean()))
    smooth = Preference(beta=0.5, smoothing=0.1)(POLICY, REFERENCE).losses
    torch.testing.assert_close(smooth, -0.9 * sigmoid(0.5 * H) - 0.1 * sigmoid(-0.5 * H))
    simpo = Preference(kind="simpo", beta=2.0, margin=0.3)(POLICY).losses
    torch.testing.assert_close(simpo, -sigmoid(2 * (POLICY.chosen - POLICY.rejected) - 0.3))
    odds = [math.log(math.exp(p) / (1 - math.exp(p))) for p in (-1.0, -2.0)]
    assert float(odds_loss(POLICY)[0]) == pytest.approx(math.log1p(math.exp(odds[1] - odds[0])))
    orpo = Preference(kind="orpo", beta=0.2)(POLICY).losses
    torch.testing.assert_close(orpo, -POLICY.chosen + 0.2 * odds_loss(POLICY))


def test_an_unchanged_policy_has_no_preference_and_is_pushed_apart() -> None:
    policy = Pair(*(v.clone().requires_grad_() for v in POLICY))
    found = Preference()(policy, POLICY)
    torch.testing.assert_close(found.losses, torch.full((2,), math.log(2)))
    found.losses.sum().backward()
    assert policy.chosen.grad is not None and policy.rejected.grad is not None
    assert (policy.chosen.grad < 0).all() and torch.equal(policy.rejected.grad, -policy.chosen.grad)
    assert not found.chosen.requires_grad


def test_imitation_adds_the_likelihood_of_the_preferred() -> None:
    plain = Preference()(POLICY, REFERENCE).losses
    nll = torch.tensor([0.3, 0.4])
    torch.testing.assert_close(Preference(imitation=0.5)(POLICY, REFERENCE, nll).losses, plain + 0.5 * nll)
    with pytest.raises(ValueError, match="expected nll"):
        Preference(imitation=0.5)(POLICY, REFERENCE)


def test_options_that_do_not_fit_are_named() -> None:
    for values, message in (({"kind": "dpo"}, "expected kind sigmoid"), ({"beta": 0.0}, "beta > 0"),
                            ({"kind": "hinge", "smoothing": 0.1}, "of sigmoid only")):
        with pytest.raises(ValueError, match=message):
            Preference(**values)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a reference for sigmoid, got none"):
        Preference()(POLICY)
    with pytest.raises(ValueError, match="expected no reference for simpo, got one"):
        Preference(kind="simpo")(POLICY, REFERENCE)
    with pytest.raises(ValueError, match="got 3 in all"):
        Pair.of(torch.zeros(3))


def test_the_published_example_of_diffusion() -> None:
    policy, reference = (Pair.of(error_log_prob(torch.tensor(e))) for e in ([0.10, 0.12], [0.11, 0.115]))
    found = Preference(beta=100.0)(policy, reference)
    assert float(found.chosen - found.rejected) == pytest.approx(0.75, abs=1e-4)
    assert float(found.losses) == pytest.approx(0.386871, abs=2e-5)


def test_bits_are_summed_over_cells_and_averaged_on_demand() -> None:
    logits, bits = torch.randn(2, 5, 3, 2), torch.randint(0, 2, (2, 5, 3))
    each = logits.log_softmax(-1).gather(-1, bits[..., None])[..., 0]
    torch.testing.assert_close(code_log_prob(logits, bits), each.sum((1, 2)))
    torch.testing.assert_close(code_log_prob(logits, bits, "mean"), each.mean(2).sum(1))
    codes, scores = torch.randint(0, 7, (2, 5)), torch.randn(2, 5, 7)
    own = scores.log_softmax(-1).gather(-1, codes[..., None])[..., 0].sum(1)
    torch.testing.assert_close(code_log_prob(scores, codes), own)


def test_pairs_share_noise() -> None:
    noise = torch.randn(3, 4)
    assert torch.equal(shared(noise), torch.cat((noise, noise))) and shared(noise[:, 0]).shape == (6,)
