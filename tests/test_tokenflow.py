"""TokenFlow: two models on one tokenizer, what is read, drawing in several passes, published numbers."""
import dataclasses
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diptych.adapters import parity, tokenflow, tokenflow_cases
from diptych.document import Document, Image, Text
from diptych.objectives import next_scale
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_token import TokenSampling, choose, log_probs
from diptych.parts.blocks import BlockConfig
from diptych.parts.interleave import GENERATE
from diptych.parts.tokens import Modality
from diptych.parts.trunks import pick
from diptych.systems.base import Event, Sampling
from diptych.systems.tokenflow import TokenFlow
from diptych.systems.works import Read, Reader, Together
from diptych.training.recipe import load_recipe
from diptych.training.setup import system_config
from diptych.world.tasks import document

GOLDENS = Path(__file__).parent / "goldens"
CELLS = 1 + 4 + 16
AGAIN = (TokenSampling(top_k=8), TokenSampling(top_k=1))


def build(**changes: Any) -> TokenFlow:
    torch.manual_seed(0)
    return TokenFlow(dataclasses.replace(TokenFlow.tiny(), drop_text=0.0, **changes)).eval()


@cache
def tiny() -> TokenFlow:
    return build()


def prompt(model: TokenFlow, text: str) -> Reader:
    """The drawing model's context behind a text."""
    reader = Reader(branch=GENERATE)
    w = model.writer(reader)
    assert model.vocabulary is not None
    w.text(model.vocabulary.encode(text))
    model.run([Read(reader, w)])
    return reader


# -- two models -------------------------------------------------------------------------------------------------------

def test_each_kind_of_target_teaches_its_own_model() -> None:
    """They share no parameter, and a document with targets of both kinds is two samples."""
    model = tiny()
    reading, drawing = ("embed", "head", "projector"), ("draw_", "level", "table")
    for task, own, other in (("caption", reading, drawing), ("draw", drawing, reading)):
        model.zero_grad()
        model.loss(model.collate([document(task, 0)]), torch.Generator()).total().backward()
        moved = {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
        assert all(any(n.startswith(o) for n in moved) for o in own), task
        assert not any(n.startswith(other) for n in moved), task
        assert {n.split(".")[4] for n in moved if n.startswith("trunk.layers")} == {"0" if task == "caption" else "1"}
    model.zero_grad()
    kinds = [{type(p) is Image for p in s.targets} for s in model.samples(document("plan", 0))]
    assert kinds == [{False}, {True}]


def test_who_sees_whom() -> None:
    """A scale sees all of itself and of what came before; the picture that is read is causal, as any text."""
    model = tiny()
    tokens = model.collate([document("edit", 0)]).page.tokens
    mask = model.mask.dense(tokens)[0]
    code = torch.nonzero(tokens.modality[0] == Modality.CODE).squeeze(1)
    start, spans = int(code[0]), next_scale.spans(model.config.scales)
    for span in spans:
        for row in range(start + span.start, start + span.stop):
            seen = torch.nonzero(mask[row]).squeeze(1)
            assert len(seen) == start + span.stop and int(seen[-1]) == start + span.stop - 1
    read = torch.nonzero(tokens.modality[0] == Modality.FEATURE).squeeze(1)
    assert len(read) == 16 and torch.equal(mask[read[0] : read[-1] + 1].sum(1), read + 1)


# -- what is read -----------------------------------------------------------------------------------------------------

def test_pictures_are_read_as_their_codes_say() -> None:
    model = tiny()
    pictures = [p.pixels for i in range(2) for p in document("draw", i).of(Image)]
    views = [torch.from_numpy(p) for p in pictures if p is not None]
    codes = torch.stack(model.encode(views))
    assert codes.shape == (2, CELLS) and not torch.equal(codes[0], codes[1])
    said = model.quantizer.lookup(codes).movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(model.see(views), said)
    z = build(features="continuous").see(views)
    halves = z.split(model.codec.config.widths, -1)
    assert all(torch.allclose(h.norm(dim=-1), torch.ones(32), atol=1e-5) for h in halves)
    assert not torch.allclose(z, said, atol=1e-2)
    torch.testing.assert_close(model.decode(codes, (4, 4)), model.codec(torch.stack(views)).pixels.clamp(-1, 1))


def test_both_models_read_pictures_through_their_own_projector() -> None:
    model, d = build(), document("edit", 1)
    with torch.no_grad():
        model.projector[2].bias += 1.0  # type: ignore[operator]
        same = model.loss(model.collate([d]), torch.Generator()).sums["image"]
        torch.testing.assert_close(same, tiny().loss(tiny().collate([d]), torch.Generator()).sums["image"])
        model.draw_projector[2].weight *= 3.0  # type: ignore[operator]
        moved = model.loss(model.collate([d]), torch.Generator()).sums["image"]
    assert abs(moved - same) > 1e-3


# -- drawing ----------------------------------------------------------------------------------------------------------

def drawing(model: TokenFlow, contexts: dict[str, Reader], sampling: Sampling) -> tuple[Tensor, list[list[Tensor]]]:
    """Codes, and what was answered in every pass."""
    uniforms = next_scale.uniforms(model.config.scales, (), torch.Generator().manual_seed(5), len(sampling.again))
    program = model.draw(uniforms, contexts, sampling, 0, lambda event: None)
    told: list[list[Tensor]] = []
    work = next(program)
    with torch.no_grad():
        while True:
            assert isinstance(work, Together)
            told.append(model.run([work])[0])
            try:
                work = program.send(told[-1])
            except StopIteration as stop:
                return stop.value, told


def one_pass(model: TokenFlow, text: str, codes: Tensor, again: int | None = None) -> Tensor:
    """Logits (L, codes) of given codes (L,) behind a text, all scales at once; scale `again` reads its own codes."""
    w = model.writer(Reader(branch=GENERATE))
    assert model.vocabulary is not None
    w.text(model.vocabulary.encode(text))
    model.write_drawn(w, 0, model.config.scales[-1])
    page = model.lay_out([(w, [], [])]).page
    inputs = model.quantizer.running_inputs(codes[None], again=again)
    with torch.no_grad():
        states = model.states(page, None, model.cells(inputs, slice(0, len(codes)))[0])
        return model.code_logits(pick(model.trunk(states, page.tokens, model.mask), page.tokens, page.questions))


def guided(scale: float, *passes: TokenSampling) -> Sampling:
    return Sampling(guidance=Guidance(branches=(Branch(context="no_text", scale=scale),), schedule="linear"),
                    codes=passes[0], again=passes[1:])


def test_a_drawing_scores_as_in_training() -> None:
    """Cached, scale by scale, against one pass over the codes that were drawn; both contexts."""
    model, texts = tiny(), ("a red ring", "two blue squares")
    contexts = dict(zip(("full", "no_text"), (prompt(model, t) for t in texts), strict=True))
    before = contexts["no_text"].context.length
    codes, told = drawing(model, contexts, guided(2.0, TokenSampling()))
    assert codes.shape == (CELLS,) and len(told) == 3
    for i, text in enumerate(texts):
        stepwise = torch.cat([answer[i] for answer in told])
        torch.testing.assert_close(stepwise, one_pass(model, text, codes), atol=1e-4, rtol=1e-4)
    # the document's own context goes on behind the picture, the others do not
    assert contexts["no_text"].context.length == before
    assert contexts["full"].context.length == contexts["full"].position > before + 15


def test_more_passes_read_the_scale_itself_and_leave_no_trace() -> None:
    """1 + 2 x 3 passes: the first of a scale reads what later scales see, the others its own codes."""
    model = tiny()
    codes, told = drawing(model, {"full": prompt(model, "a red ring")}, guided(1.0, TokenSampling(), *AGAIN))
    assert [len(t[0]) for t in told] == [1, 4, 4, 4, 16, 16, 16]
    assert torch.equal(codes[5:], told[6][0].argmax(-1))  # the last pass takes the likeliest
    plain = one_pass(model, "a red ring", codes)
    torch.testing.assert_close(told[1][0], plain[1:5], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(told[4][0], plain[5:], atol=1e-4, rtol=1e-4)
    # the codes of the second pass are those that the third reads
    third, drawn = told[3][0], codes.clone()
    drawn[1:5] = drawing_of(told[2][0], 1, AGAIN[0])
    torch.testing.assert_close(third, one_pass(model, "a red ring", drawn, again=1)[1:5], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(third, plain[1:5], atol=1e-3)


def drawing_of(logits: Tensor, scale: int, cuts: TokenSampling) -> Tensor:
    """What `drawing` chose in the second pass over a scale."""
    uniforms = next_scale.uniforms(tiny().config.scales, (), torch.Generator().manual_seed(5), 2)
    return choose(log_probs(logits, cuts), uniforms[1 + 3 * (scale - 1) + 1])


def test_words_count_in_training_and_are_never_drawn() -> None:
    model = tiny()
    hidden, codes = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)), torch.arange(5)
    logits = model.draw_head(hidden)
    assert logits.shape == (5, 1024 + 64)
    torch.testing.assert_close(model.code_logits(hidden), logits[:, 1024:])
    expected = logits.logsumexp(-1) - logits.gather(1, 1024 + codes[:, None])[:, 0]
    torch.testing.assert_close(model.code_error(hidden, codes), expected)


def test_the_drawing_is_shown_as_it_grows() -> None:
    events: list[Event] = []
    d = Document((Text(text="a red ring"), Image(size=(64, 64), target=True)))
    tiny().generate([d], Sampling(partial=9, again=AGAIN[:1]), emit=lambda number, event: events.append(event))
    assert [e.kind for e in events] == ["partial", "partial", "picture"]
    assert all(e.value.shape == (3, 64, 64) for e in events) and not torch.equal(events[0].value, events[2].value)


def test_a_negative_prompt_stands_where_the_text_is_missing() -> None:
    model = build(negative="a mess")
    d = Document((Text(text="a red ring"), Image(size=(64, 64), target=True)))
    sampling = guided(4.0, TokenSampling(temperature=0.0))
    pictures = [m.generate([d], sampling)[0].pieces[1] for m in (model, tiny())]
    assert not (pictures[0].pixels == pictures[1].pixels).all()  # type: ignore[union-attr]
    written = model.write(document("draw", 0), (True, False, False))[0]
    assert model.vocabulary is not None
    assert written.ids[1:-1 - CELLS] == model.vocabulary.encode("a mess")


# -- what users get wrong ---------------------------------------------------------------------------------------------

def test_configs_and_sizes_that_do_not_fit_are_errors() -> None:
    c = TokenFlow.tiny()
    with pytest.raises(ValueError, match=r"from one cell to the \(8, 8\) cells of a picture, got \[\(1, 1\), \(2, 2\)"):
        dataclasses.replace(c, picture=(128, 128))
    with pytest.raises(ValueError, match="features quantized or continuous, got 'raw'"):
        dataclasses.replace(c, features="raw")  # type: ignore[arg-type]
    d = Document((Text(text="a red ring"), Image(size=(32, 64), target=True)))
    with pytest.raises(ValueError, match=r"expected pictures of \(64, 64\) pixels.*got \(32, 64\); fix"):
        tiny().generate([d])
    with pytest.raises(ValueError, match="neither modulated nor parallel"):
        BlockConfig(width=8, heads=2, kv_heads=2, head_dim=4, hidden=8, norm_behind=True, parallel=True)


def test_the_recipe_is_read() -> None:
    recipe = load_recipe(Path(__file__).parents[1] / "recipes" / "tokenflow.yaml")
    assert recipe.system == "tokenflow" and [s.name for s in recipe.stages] == ["align", "train", "tune"]
    cls, config = system_config(dataclasses.replace(recipe, init={}))
    assert cls is TokenFlow and config == TokenFlow.small()


# -- published numbers ------------------------------------------------------------------------------------------------

def test_every_golden_case() -> None:
    cases = parity.run("tokenflow", GOLDENS / "tokenflow")
    assert [c.name for c in cases if not c.passed] == []
    assert len(cases) == 62 and max(c.absolute for c in cases) < 5e-5
    assert {c.name.split(".")[0] for c in cases} == {"tokenizer", "train", "t2i", "t2i_train", "sample_loop1",
                                                     "sample_loop3"}


@pytest.mark.parametrize(("key", "hit"), [
    ("model.layers.1.self_attn.qknorm.key_norm.weight", {"t2i_train.logits", "sample_loop3.mixed_logits_pass00"}),
    ("model.lvl_embed.weight", {"t2i_train.inputs_embeds", "sample_loop1.mixed_logits_pass04"}),
])
def test_one_wrong_weight_is_noticed(key: str, hit: set[str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDENS / "tokenflow", tmp_path / "tokenflow"))
    tensors = load_file(folder / "t2i.safetensors")
    tensors[key][-1] += 0.5
    save_file(tensors, folder / "t2i.safetensors")
    model, golden = tokenflow.load(folder), load_file(folder / "golden.safetensors")
    about = json.loads((folder / "config.json").read_text())["t2i"]
    failed = set()
    for name in ("t2i_train", "sample_loop1", "sample_loop3"):
        given, wanted = (tokenflow_cases.scales.case_tensors(name, golden, s) for s in ("input", "output"))
        with torch.no_grad():
            own = tokenflow_cases.training(model, about, given, wanted) if name == "t2i_train" else \
                tokenflow_cases.drawing(model, about, given, tokenflow_cases.options(name, folder))
        failed |= {f"{name}.{k}" for k, v in wanted.items() if not torch.allclose(own[k].float(), v.float(), atol=3e-4)}
    assert hit <= failed


def test_what_a_published_folder_leaves_out_is_named(tmp_path: Path) -> None:
    about = json.loads((GOLDENS / "tokenflow" / "config.json").read_text())["t2i"]
    codec = tokenflow.load_tokenizer(GOLDENS / "tokenflow").config
    for key, value, message in (("hidden_act", "gelu", "hidden_act to be 'silu'"),
                                ("vocab_size", 90, "behind 41 words, got vocab_size 90")):
        with pytest.raises(ValueError, match=message):
            tokenflow.config_of({**about, key: value}, codec)
    with pytest.raises(ValueError, match=r"state `loop2: cfg W, \(top_k K, top_p P\)`"):
        tokenflow_cases.options("sample_loop2", tmp_path)
    found = tokenflow_cases.options("sample_loop3", GOLDENS / "tokenflow")
    assert found.guidance.branches[0].scale == 5.0 and found.codes == TokenSampling(top_k=30, top_p=0.8)
    assert found.again == (TokenSampling(top_k=10, top_p=0.8), TokenSampling(top_k=1))
