"""FUDOKI: slots of answers, one sequence per target, what is seen, noised and learnt, guidance, refining, checkpoints,
golden cases."""
import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diptych.adapters import fudoki
from diptych.document import Document, Image, Text
from diptych.objectives import discrete_flow
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_token import TextSampling, TokenSampling
from diptych.parts.interleave import IGNORE
from diptych.parts.pictures import pad_square
from diptych.systems.base import Sampling
from diptych.systems.fudoki import TURNS, Fudoki
from diptych.systems.works import Guess
from diptych.training.recipe import load_recipe
from diptych.world.tasks import document

GOLDEN = Path(__file__).parent / "goldens" / "fudoki"
QUICK = Sampling(evaluations=3, text=TextSampling(max_tokens=48), codes=TokenSampling(temperature=1.0))


def build(**changes: Any) -> Fudoki:
    torch.manual_seed(0)
    return Fudoki(dataclasses.replace(Fudoki.tiny(), drop_text=0.0, **changes)).eval()


@cache
def tiny() -> Fudoki:
    return build()


def answer_only(model: Fudoki, monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> list[list[int]]:
    """Every posterior says `ids`; returns what the network was shown in the slots at every evaluation."""
    shown: list[list[int]] = []

    def told(works: list[Any]) -> list[Any]:
        out = []
        for work in works:
            assert isinstance(work, Guess)
            shown.append(work.x.tolist())
            logits = torch.full((len(ids), model.values["text"]), -50.0)
            logits[torch.arange(len(ids)), torch.tensor(ids)] = 50.0
            out.append([logits for _ in work.sequences])
        return out

    monkeypatch.setattr(model, "run", told)
    return shown


# -- sequences --------------------------------------------------------------------------------------------------------

def test_answers_fill_their_slots() -> None:
    model, d = tiny(), document("question", 0)
    v, m, pad = model.need_vocabulary(), model.marks, model.config.network.pad
    ids = v.encode(d.pieces[2].text)  # type: ignore[attr-defined]
    w = model.with_target(d, 2)[0]
    labels = [i for i in w.labels if i != IGNORE]
    assert labels == [*ids, m.end, *[pad] * (model.config.slots - len(ids) - 1)]
    assert w.ids[-model.config.slots:] == labels and w.labels[-1] == IGNORE
    assert w.ids[-model.config.slots - 1] == m.start  # predicts the first slot
    with pytest.raises(ValueError, match="fewer than 3 tokens, got .*fix: shorten it"):
        build(slots=3).with_target(document("caption", 0), 2)


def test_every_target_has_its_sequence() -> None:
    model, d = tiny(), document("story", 0)
    targets = [i for i, p in enumerate(d) if p.target]
    batch = model.collate([d])
    tokens = batch.page.tokens
    assert len(targets) == len({(b, int(i)) for b, row in enumerate(tokens.document) for i in row if i >= 0})
    for i in targets:
        w, pictures, views = model.with_target(d, i)
        assert len(pictures) == isinstance(d.pieces[i], Image)
        assert len(views) == sum(isinstance(p, Image) for p in d.pieces[:i])  # earlier ones are read by features
        assert bool(w.questions) == isinstance(d.pieces[i], Image)


def test_all_see_all_of_their_own_document() -> None:
    model = tiny()
    tokens = model.collate([document("question", 0), document("draw", 1)]).page.tokens
    allowed = model.mask.dense(tokens)
    together = (tokens.document[:, :, None] == tokens.document[:, None]) & tokens.valid()[:, :, None]
    assert torch.equal(allowed[tokens.valid()], together[tokens.valid()])


def test_pictures_are_predicted_one_ahead_and_closed() -> None:
    model, d = tiny(), document("draw", 0)
    w, m = model.with_target(d, 1)[0], tiny().marks
    count = len(w.questions)
    first = len(w.ids) - 1 - count
    assert w.questions == list(range(first - 1, first + count - 1))
    assert w.ids[first - 1] == m.image_start and w.ids[-1] == m.image_end


def test_the_prompt_without_text_is_pads() -> None:
    model, d = build(network=dataclasses.replace(Fudoki.tiny().network, turns=TURNS)), document("draw", 0)
    d = Document((d.pieces[0], d.pieces[1].replace(role="assistant")))
    full, null = model.before(d, 1).writer.ids, model.before(d, 1, (True, False, False)).writer.ids
    assert null[0] == full[0] == model.marks.start and len(null) == len(full)
    assert set(null[1:]) == {model.config.network.pad} != set(full[1:])


def test_the_template() -> None:
    ask, drawn = Text(text="a red cube"), Image(role="assistant", target=True)
    assert TURNS.lead(None, ask) + " a red cube" + TURNS.lead(ask, drawn) == "User: a red cube\n\nAssistant:"
    assert TURNS.lead(Image(), ask) == ""


# -- training ---------------------------------------------------------------------------------------------------------

def test_noise_is_in_the_targets_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, d = build(), document("caption", 0)
    batch, seen = model.collate([d]), []
    forward = model.forward_page
    monkeypatch.setattr(model, "forward_page", lambda page, *how: seen.append(page.ids) or forward(page, *how))
    for seed in range(4):
        model.loss(batch, torch.Generator().manual_seed(seed))
    slots = torch.zeros_like(batch.page.ids, dtype=torch.bool)
    slots[:, 1:] = batch.page.labels[:, :-1] != IGNORE
    assert all(torch.equal(ids[~slots], batch.page.ids[~slots]) for ids in seen)
    assert any(not torch.equal(ids, batch.page.ids) for ids in seen)  # late times keep every token
    assert any(not torch.equal(ids, seen[0]) for ids in seen)


@pytest.mark.parametrize("path", ["uniform", "masked"])
def test_controls_share_everything_else(path: Any) -> None:
    model = build(path=path)
    documents = [document("question", 0), document("draw", 1)]
    losses = model.loss(model.collate(documents), torch.Generator().manual_seed(0))
    assert all(torch.isfinite(v) for v in losses.sums.values()) and set(losses.sums) == {"text", "image"}
    x = model.path("image").prior(torch.rand(200))
    assert (x == model.values["image"]).all() == (path == "masked")
    extra = 64 + 8 if path == "masked" else 0  # a row in each table of inputs
    assert model.num_parameters() == tiny().num_parameters() - tiny().metric.get_parameter("text.weight").numel() \
        + extra
    assert not any(p.empty for d in model.generate(documents, QUICK) for p in d.targets)


def test_paths_follow_their_tables() -> None:
    model = build()
    before = model.path("text")
    assert model.path("text") is before
    with torch.no_grad():
        model.metric.get_parameter("text.weight").mul_(-1)[0].add_(1.0)
        codes = model.path("image")
        model.codec.get_parameter("quantizer.codebook.weight").mul_(-1)  # whose rows measure codes
    assert model.path("text") is not before and model.path("image") is not codes


# -- generating -------------------------------------------------------------------------------------------------------

def test_text_before_the_first_end_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, d = build(), document("question", 0)
    v, m, pad = model.need_vocabulary(), model.marks, model.config.network.pad
    ids = v.encode("a red ring")
    filled = [*ids, m.end, *v.encode("noise"), m.end]
    shown = answer_only(model, monkeypatch, filled + [pad] * (model.config.slots - len(filled)))
    said = model.generate([d], QUICK)[0].pieces[2]
    assert said.text == "a red ring" and len(shown) == 3  # type: ignore[attr-defined]
    short = dataclasses.replace(QUICK, text=TextSampling(max_tokens=2))
    assert model.generate([d], short)[0].pieces[2].text == v.decode(ids[:2])  # type: ignore[attr-defined]


def test_refining_starts_from_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, d = build(), document("caption", 0)
    labels = [i for i in model.with_target(d, 2)[0].labels if i != IGNORE]
    shown = answer_only(model, monkeypatch, labels)
    again = model.refine([d], QUICK)
    assert all(x == labels for x in shown) and again[0].pieces[2] == d.pieces[2]
    shown.clear()
    model.generate([d], QUICK)
    assert shown[0] != labels


def test_refining_a_picture_starts_from_its_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, d, shown = build(), document("draw", 0), []
    run = model.run
    monkeypatch.setattr(model, "run", lambda works: shown.extend(w.x for w in works if isinstance(w, Guess))
                        or run(works))
    model.refine([d], QUICK)
    picture = torch.from_numpy(d.pieces[1].pixels)  # type: ignore[attr-defined]
    assert torch.equal(shown[0], model.encode([picture])[0])


def test_refining_may_begin_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model, walked, euler = build(), [], discrete_flow.euler
    monkeypatch.setattr(discrete_flow, "euler", lambda path, x, times, chance: walked.append(times)
                        or euler(path, x, times, chance))
    model.refine([document("draw", 0)], dataclasses.replace(QUICK, start=0.4))
    assert walked == [pytest.approx([0.4, 0.6, 0.8, 1.0])]


def test_guidance_asks_for_as_many_contexts_as_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = build(), list[int]()
    run = model.run
    monkeypatch.setattr(model, "run", lambda works: asked.extend(len(w.sequences) for w in works
                                                                 if isinstance(w, Guess)) or run(works))
    guided = dataclasses.replace(QUICK, guidance=Guidance(branches=(Branch(context="no_text", scale=3.0),)))
    model.generate([document("draw", 0)], guided)
    assert asked == [2, 2, 2]
    asked.clear()
    model.generate([document("draw", 0), document("question", 0)], QUICK)
    assert set(asked) == {1}


def test_published_size() -> None:
    with torch.device("meta"):
        model = Fudoki(Fudoki.paper())
    tables = 102400 * 4096 + 16384 * 8
    assert model.metric.get_parameter("text.weight").shape == (102400, 4096)
    assert model.num_parameters() - tables == model.network.num_parameters() == pytest.approx(2.08e9, rel=0.02)


def test_configs_that_cannot_work_are_errors() -> None:
    with pytest.raises(ValueError, match="slots >= 1 and a path"):
        dataclasses.replace(Fudoki.tiny(), path="metrics")
    with pytest.raises(ValueError, match="fix: set network.pad"):
        dataclasses.replace(Fudoki.tiny(), network=dataclasses.replace(Fudoki.tiny().network, variant="paper"))


# -- checkpoints and golden cases -------------------------------------------------------------------------------------

def test_every_golden_case() -> None:
    cases = fudoki.parity(GOLDEN)
    names = {c.name.split(".")[0] for c in cases}
    assert {k.split(".")[0] for k in load_file(GOLDEN / "golden.safetensors")} - names == {"mixture_solver"}
    assert [c.name for c in cases if not c.passed] == []


def test_one_wrong_table_is_noticed(tmp_path: Path) -> None:
    """The codebook in place of the metric table of codes."""
    for name in ("config.json", "golden.safetensors", "weights.safetensors"):
        (tmp_path / name).write_bytes((GOLDEN / name).read_bytes())
    with pytest.raises(FileNotFoundError, match="metric_tables.safetensors or text_embedding.pt"):
        fudoki.load(tmp_path)
    tables = load_file(GOLDEN / "metric_tables.safetensors")
    book = load_file(GOLDEN / "weights.safetensors")["gen_vision_model.quantize.embedding.weight"]
    save_file(tables | {"image_embedding.weight": book}, tmp_path / "metric_tables.safetensors")
    failed = {c.name.split(".")[0] for c in fudoki.parity(tmp_path) if not c.passed}
    assert {"path_image", "step_image_t5", "t2i_cfg5"} <= failed and not {"path_text", "i2t", "forward_gen"} & failed


def test_released_tables_are_pickled_embeddings(tmp_path: Path) -> None:
    tables = load_file(GOLDEN / "metric_tables.safetensors")
    for kind in ("text", "image"):
        torch.save(nn.Embedding.from_pretrained(tables[f"{kind}_embedding.weight"]), tmp_path / f"{kind}_embedding.pt")
    read = fudoki.read_metric(tmp_path)
    assert all(torch.equal(read[kind], tables[f"{kind}_embedding.weight"]) for kind in ("text", "image"))


def test_bilinear_padding() -> None:
    wide = torch.linspace(-1, 1, 100).expand(3, 2, 100)
    flat = pad_square(wide, 32, shortest=1, filter="bilinear")
    assert ((flat[0] - (127 / 127.5 - 1)).abs() > 0.1).any(1).sum() == 1  # no least height
    assert not torch.equal(pad_square(wide, 32, shortest=1), flat)


def test_the_recipe_is_read() -> None:
    recipe = load_recipe(Path(__file__).parents[1] / "recipes" / "fudoki.yaml")
    assert recipe.system == "fudoki" and [s.name for s in recipe.stages] == ["adapt", "unify"]
