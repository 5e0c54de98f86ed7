"""Next-scale prediction: plans, lessons, the sampler against plain loops, its log-probs, self-correction; and the
transformer over scales: who sees whom, cached steps, what the condition and the memory do."""
import dataclasses
import json
import shutil
from collections.abc import Generator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diptych.adapters import parity, var
from diptych.objectives import next_scale, next_token
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_scale import Ask, Step
from diptych.objectives.next_token import TokenSampling
from diptych.parts.quantize import (
    CodebookConfig,
    MixConfig,
    ResidualConfig,
    ResidualQuantizer,
    SignConfig,
    flip_bits,
    resize,
)
from diptych.parts.scales import ScaleConfig, ScaleTransformer, TextCondition, block_causal, finest_places

GOLDENS = Path(__file__).parent / "goldens"
SCALES = ((1, 1), (2, 2), (4, 4))
WORDS = ResidualConfig(codebook=CodebookConfig(values=7, width=3, norm="none"), scales=SCALES, mix=MixConfig(count=2))
BITS = ResidualConfig(codebook=SignConfig(width=3, unit=True, packed=False), scales=SCALES, up="bilinear",
                      compare="step")
TINY = ScaleConfig(width=16, layers=2, heads=2, hidden=24, code_width=3, values=2, code_shape=(3,), scales=SCALES)


@cache
def quantizer(config: ResidualConfig) -> ResidualQuantizer:
    torch.manual_seed(0)
    made = ResidualQuantizer(config)
    if config is WORDS:
        torch.nn.init.normal_(made.codebook.weight)
    return made


def lively(**changes: Any) -> ScaleTransformer:
    torch.manual_seed(0)
    model = ScaleTransformer(dataclasses.replace(TINY, **changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape))
    return model


def drive(sampler: Generator[Ask, Mapping[str, Tensor], list[Step]], answers: list[dict[str, Tensor]]
          ) -> tuple[list[Step], list[Ask]]:
    asks = [next(sampler)]
    try:
        while True:
            asks.append(sampler.send(answers[len(asks) - 1]))
    except StopIteration as stop:
        return stop.value, asks


# -- scales -----------------------------------------------------------------------------------------------------------

def test_scales_of_other_pictures() -> None:
    base = ((1, 1), (2, 2), (5, 5), (8, 8))
    assert next_scale.scales_for(base, (8, 8)) == base
    assert next_scale.scales_for(base, (16, 8)) == ((2, 1), (4, 2), (10, 5), (16, 8))
    assert next_scale.scales_for(base, (2, 3)) == ((1, 1), (1, 1), (1, 2), (2, 3))
    assert next_scale.spans(base) == [slice(0, 1), slice(1, 5), slice(5, 30), slice(30, 94)]


# -- training ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("config", "mode"), [(WORDS, "area"), (BITS, "area"), (BITS, "running")])
def test_a_lesson_is_what_sampling_reads(config: ResidualConfig, mode: Any) -> None:
    """Codes put into the mouth of the sampler: it reads what training showed for them, and they say the map again."""
    book, features = quantizer(config), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    lesson = next_scale.lesson(book, features, SCALES, mode)
    codes = lesson.codes[1]
    assert lesson.codes.shape[:2] == (2, 21) and lesson.inputs.shape == (2, 20, 3)
    values = book.codebook.values
    sure = [{"full": 50.0 * torch.nn.functional.one_hot(codes[span], values)} for span in next_scale.spans(SCALES)]
    how = next_scale.every_scale(3, Guidance(), TokenSampling())
    numbers = next_scale.uniforms(SCALES, codes.shape[1:], torch.Generator().manual_seed(0))
    assert [tuple(u.shape[1:]) for u in numbers] == [tuple(codes.shape[1:])] * 3
    steps, asks = drive(next_scale.sample(book, SCALES, mode, how, numbers), sure)
    assert torch.equal(torch.cat([s.codes for s in steps]), codes)
    assert asks[0].inputs is None and [a.scale for a in asks] == [0, 1, 2]
    torch.testing.assert_close(torch.cat([a.inputs for a in asks[1:] if a.inputs is not None]), lesson.inputs[1])


def test_later_labels_repair_changed_codes() -> None:
    """Every bit of the first scale turned: its label stays, the sum and what follows do not."""
    book, features = quantizer(BITS), torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    plain = next_scale.lesson(book, features, SCALES, "bilinear")
    turned = next_scale.lesson(book, features, SCALES, "bilinear", flip_bits([torch.zeros(1, 1, 1, 3)], [1.0]))
    assert torch.equal(plain.codes[:, :1], turned.codes[:, :1])
    assert not torch.equal(plain.codes[:, 1:], turned.codes[:, 1:])
    torch.testing.assert_close(turned.inputs[:, :4], -plain.inputs[:, :4])
    # the second scale asks for what was found wrongly
    whole = book.lookup(plain.codes[:, :1], SCALES)
    rest = features + whole
    assert torch.equal(turned.codes[:, 1:5], (resize(rest, (2, 2), "area") > 0).long().flatten(2).transpose(1, 2))


def test_every_bit_counts() -> None:
    logits = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0))
    bits = torch.tensor([[0, 1, 1]] * 5)
    expected = logits.logsumexp(-1) - logits.gather(-1, bits[..., None])[..., 0]
    torch.testing.assert_close(next_scale.loss(logits, bits), expected)


# -- sampling ---------------------------------------------------------------------------------------------------------

def test_guidance_grows_over_the_scales() -> None:
    chain = Guidance(branches=(Branch(context="null", scale=4.0),), schedule="linear")
    how = next_scale.every_scale(4, chain, TokenSampling())
    assert [h.guidance.branches[0].scale for h in how] == [1, 2, 3, 4]
    assert {h.guidance.branches[0].scale for h in next_scale.every_scale(3, dataclasses.replace(
        chain, schedule="constant"), TokenSampling())} == {4.0}
    assert next_scale.every_scale(1, chain, TokenSampling())[0].guidance.branches[0].scale == 1


def test_a_scale_is_drawn_as_by_plain_loops() -> None:
    """Also the last one is guided, with the cuts of top_k, and the log-prob is that of the distribution drawn from."""
    generator = torch.Generator().manual_seed(3)
    answers = [{name: torch.randn(r * c, 7, generator=generator) for name in ("full", "null")} for r, c in SCALES]
    chain = Guidance(branches=(Branch(context="null", scale=3.0),), schedule="linear")
    how = next_scale.every_scale(3, chain, TokenSampling(temperature=0.5, top_k=3))
    numbers = next_scale.uniforms(SCALES, (), generator)
    steps, _ = drive(next_scale.sample(quantizer(WORDS), SCALES, "area", how, numbers), answers)
    for k, (answer, step) in enumerate(zip(answers, steps, strict=True)):
        t = 2.0 * k / 2
        guided = ((1 + t) * answer["full"] - t * answer["null"]) / 0.5
        for row, u, code, said in zip(guided, numbers[k].tolist(), step.codes.tolist(), step.log_probs, strict=True):
            kept = sorted(range(7), key=lambda i: -float(row[i]))[:3]
            weights = [float(row[i].exp()) if i in kept else 0.0 for i in range(7)]
            total = 0.0
            drawn = next(i for i, w in enumerate(weights) if (total := total + w) > u * sum(weights))
            assert drawn == code
            assert float(said) == pytest.approx(float(torch.tensor(weights[code] / sum(weights)).log()), abs=1e-5)
    greedy = next_scale.every_scale(3, Guidance(), TokenSampling(temperature=0.0))
    steps, _ = drive(next_scale.sample(quantizer(WORDS), SCALES, "area", greedy, numbers), answers)
    assert all(torch.equal(s.codes, a["full"].argmax(-1)) for s, a in zip(steps, answers, strict=True))


@pytest.mark.parametrize("mode", ["running", "bilinear"])
def test_more_passes_over_a_scale_read_its_own_codes(mode: Any) -> None:
    """Each with its cuts and numbers; the last says what the scale is, and what the next one reads."""
    book, generator = quantizer(BITS), torch.Generator().manual_seed(4)
    again = (TokenSampling(top_k=1),)
    how = next_scale.every_scale(3, Guidance(), TokenSampling(), again)
    assert [len(h.again) for h in how] == [0, 1, 1]
    numbers = next_scale.uniforms(SCALES, (3,), generator, 1)
    assert [len(u) for u in numbers] == [1, 4, 4, 16, 16]
    answers = [{"full": torch.randn(n, 3, 2, generator=generator)} for n in (1, 4, 4, 16, 16)]
    steps, asks = drive(next_scale.sample(book, SCALES, mode, how, numbers), answers)
    assert [(a.scale, a.turn) for a in asks] == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert all(torch.equal(steps[k].codes, answers[2 * k]["full"].argmax(-1)) for k in (1, 2))
    first = next_token.choose(next_token.log_probs(answers[1]["full"], TokenSampling()), numbers[1])
    for codes, ask in ((first, asks[2]), (steps[1].codes, asks[3])):
        maps = book.partial_maps(torch.cat((steps[0].codes, codes))[None], SCALES)
        small = book.run_on(resize(maps[0], (2, 2), "area"), 1, codes.unflatten(0, (2, 2))[None])
        whole = small if mode == "running" else maps[1]
        torch.testing.assert_close(ask.inputs, resize(whole, SCALES[ask.scale], "bilinear")[0].flatten(1).T)
    with pytest.raises(ValueError, match="no self-correction of a running sum"):
        next_scale.lesson(book, torch.zeros(1, 3, 4, 4), SCALES, "running", lambda step, bits: bits)


def test_each_scale_needs_its_numbers() -> None:
    with pytest.raises(ValueError, match="each of 3 scales.*all 2 passes, got 2 and 1"):
        next(next_scale.sample(quantizer(WORDS), SCALES, "area", next_scale.every_scale(2, Guidance(), TokenSampling()),
                               [torch.rand(1)]))


# -- the transformer --------------------------------------------------------------------------------------------------

def test_who_sees_whom() -> None:
    """A scale sees all of itself and of the coarser ones: gradients say so."""
    mask = block_causal(SCALES)
    assert mask[0].tolist() == [True] + [False] * 20 and mask[1:5].sum().item() == 4 * 5 and mask[5:].all()
    model = lively(memory=False)
    x = torch.randn(1, 21, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    model(x, torch.ones(1, 16), SCALES)[0, 3].square().sum().backward()
    assert x.grad is not None
    assert (x.grad[0, :5].abs().sum(-1) > 0).all() and not x.grad[0, 5:].any()


@pytest.mark.parametrize("changes", [{}, {"shared": False, "memory": False, "positions": "table"}, {"unit": False}])
def test_cached_steps_equal_one_pass(changes: dict[str, Any]) -> None:
    """Two pictures with memories of different lengths; what stands behind the end of a memory does not matter."""
    model, generator = lively(**changes), torch.Generator().manual_seed(0)
    inputs, start = torch.randn(2, 20, 3, generator=generator), torch.randn(2, 16, generator=generator)
    memory = torch.randn(2, 5, 16, generator=generator)
    known = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    told: tuple[Any, Any] = (memory, known) if model.config.memory else (None, None)
    whole = model(model.enter(inputs, start), start, SCALES, *told)
    past, parts = [(), ()], []
    for k, span in enumerate(next_scale.spans(SCALES)):
        own = None if k == 0 else inputs[:, span.start - 1 : span.stop - 1]
        part, past = model.step(model.enter(own, None if k else start), start, SCALES, k, past, *told)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)
    if model.config.memory:
        alone = model(model.enter(inputs[1:], start[1:]), start[1:], SCALES, memory[1:, :3])
        torch.testing.assert_close(alone, whole[1:], atol=1e-4, rtol=1e-4)
        other = model(model.enter(inputs, start), start, SCALES, memory.flip(0), known)
        assert not torch.allclose(other, whole, atol=1e-2)
    assert not torch.allclose(model(model.enter(inputs, start), -start, SCALES, *told), whole, atol=1e-2)


def test_rotary_positions_lie_on_the_finest_grid() -> None:
    places = finest_places(SCALES)
    assert places[0].tolist() == [0, 0] and places[1:5].tolist() == [[0, 0], [0, 2], [2, 0], [2, 2]]
    longer = lively(rotary_scales=(*SCALES, (8, 8)), memory=False)
    own = lively(memory=False)
    x = torch.randn(1, 21, 16, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(longer(x, x[:, 0], SCALES), own(x, x[:, 0], SCALES), atol=1e-3)
    assert torch.equal(finest_places((*SCALES, (8, 8)))[1:5], 2 * places[1:5])
    with pytest.raises(ValueError, match="at most 5 cells"):
        short = lively(rotary_scales=SCALES[:2], memory=False)
        short(x, x[:, 0], SCALES)


def test_errors_of_the_transformer() -> None:
    model = lively()
    x = torch.zeros(1, 20, 16)
    with pytest.raises(ValueError, match="expected 21 tokens|memory: True"):
        model(x, x[:, 0], SCALES)
    with pytest.raises(ValueError, match="start vector"):
        model.enter(None, None)
    for change, message in [({"positions": "none"}, "table or rotary"), ({"levels": 2}, "each of 3 scales, got 2"),
                            ({"heads": 8}, "multiple of 4 channels")]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(TINY, **change)
    table = lively(positions="table", memory=False)
    with pytest.raises(ValueError, match="learned positions"):
        table(torch.zeros(1, 5, 16), torch.zeros(1, 16), SCALES[:2])


def test_a_fresh_transformer_is_nearly_the_identity() -> None:
    """Only the memory speaks at once: gates are almost closed."""
    torch.manual_seed(0)
    model = ScaleTransformer(dataclasses.replace(TINY, memory=False)).eval()
    x, condition = torch.randn(1, 21, 16), torch.randn(1, 16)
    for block in model.blocks:
        y, _ = block(x, model.modulation(condition), None, None, None, None)
        assert (y - x).abs().max() < 1e-3


def test_one_state_is_pooled_as_it_is() -> None:
    """And the number of states does not change what equal ones give."""
    torch.manual_seed(0)
    text = TextCondition(16, 12, 4, 6, project=True)
    one = torch.randn(1, 1, 12)
    several = one.expand(1, 5, 12)
    ones = [torch.ones(1, n, dtype=torch.bool) for n in (1, 5)]
    torch.testing.assert_close(text.condition(one, ones[0]), text.condition(several, ones[1]))
    assert text.memory(several).shape == (1, 5, 16) and text.null.shape == (6, 12)


# -- published numbers: VAR ------------------------------------------------------------------------------------------

def test_every_case_of_var() -> None:
    cases = parity.run("var", GOLDENS / "var")
    assert [c.name for c in cases if not c.passed] == [] and max(c.absolute for c in cases) < 3e-5
    names = {"forward.loss", "forward.attn_allowed", "cfg15.logits_scale3", "cfg4_plain.image"}
    assert names <= {c.name for c in cases}


def test_wrong_weights_and_options_of_var_are_noticed(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDENS / "var", tmp_path / "var"))
    tensors = load_file(folder / "var.safetensors")
    tensors["blocks.1.attn.scale_mul_1H11"][0, 2] += 0.5
    save_file(tensors, folder / "var.safetensors")
    failed = {c.name for c in parity.run("var", folder) if not c.passed}
    assert {"forward.logits", "cfg15.logits_scale0"} & failed == {"forward.logits"}  # one cell alone attends to itself
    assert not any(name.startswith("vae") for name in failed)
    # the options of a case are those its README states; without one, those of its name
    assert var.options("cfg15", GOLDENS / "var") == (1.5, TokenSampling(top_k=20, top_p=0.95))
    assert var.options("cfg4_plain", GOLDENS / "var") == (4.0, TokenSampling())
    (folder / "README.md").write_text("other: cfg 2.5, top_k 7")
    assert var.options("other", folder) == (2.5, TokenSampling(top_k=7))
    assert var.options("cfg3_plain", folder) == (3.0, TokenSampling())
    with pytest.raises(ValueError, match="got 'smooth'"):
        var.options("smooth", folder)


def test_var_with_one_modulation_for_all_blocks(tmp_path: Path) -> None:
    """Names of the published layout both ways, for the variant with shared modulation and plain attention."""
    folder = Path(shutil.copytree(GOLDENS / "var", tmp_path / "var"))
    about = json.loads((folder / "config.json").read_text())
    about["var"] |= {"shared_aln": True, "attn_l2_norm": False}
    (folder / "config.json").write_text(json.dumps(about))
    tensors = load_file(folder / "var.safetensors")
    for name in [n for n in tensors if ("ada_lin" in n and n.startswith("blocks")) or "scale_mul" in n]:
        tensors.pop(name)
    tensors |= {f"blocks.{i}.ada_gss": torch.randn(1, 1, 6, 64) for i in range(2)}
    tensors |= {"shared_ada_lin.1.weight": torch.randn(384, 64), "shared_ada_lin.1.bias": torch.randn(384)}
    save_file(tensors, folder / "var.safetensors")
    model = var.load(folder, var.load_tokenizer(folder).config)
    assert torch.equal(model.decoder.get_parameter("blocks.1.offset"), tensors["blocks.1.ada_gss"][0, 0])
    assert model.decoder.config.temperature == 4 and not model.decoder.config.unit


def test_guidance_of_one_costs_no_second_context() -> None:
    chain = Guidance(branches=(Branch(context="null", scale=1.0),))
    logits = {"full": torch.randn(4, 3, 2)}
    assert torch.equal(next_token.guide(logits, next_scale.every_scale(2, chain, TokenSampling())[1].guidance, 0.0),
                       logits["full"])
