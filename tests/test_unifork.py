"""UniFork: sizes, what each branch learns, documents of both tasks, drawing depth by depth, golden cases."""
import dataclasses
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diptych.adapters import parity, unifork
from diptych.adapters.keys import to_ours, to_theirs
from diptych.document import Document, Image, Text
from diptych.objectives import next_token
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_token import TextSampling
from diptych.parts.interleave import GENERATE, UNDERSTAND
from diptych.parts.language import LanguageConfig
from diptych.parts.trunks import pick
from diptych.systems.base import Sampling
from diptych.systems.unifork import UniFork, vila_u
from diptych.systems.works import Deepen, Read, Together
from diptych.training.recipe import load_recipe
from diptych.training.stages import trained_names
from diptych.world.tasks import document

GOLDEN = Path(__file__).parent / "goldens" / "unifork"


def build(**changes: Any) -> UniFork:
    torch.manual_seed(0)
    return UniFork(dataclasses.replace(UniFork.tiny(), **({"drop_text": 0.0} | changes))).eval()


@cache
def tiny() -> UniFork:
    return build()


# -- sizes, gradients -------------------------------------------------------------------------------------------------

def test_the_published_size_by_arithmetic() -> None:
    """Qwen2.5-0.5B, its upper 12 layers and last norm again, the projector, the depth head and the tower."""
    width, hidden, values, code, inner = 896, 4864, 16384, 1024, 3584
    layer = width * (width + 256) + width + 256 + width**2 + 3 * width * hidden + 2 * width
    block = (width * inner + inner) + (inner * width + width) + 4 * (inner**2 + inner) + 4 * width \
        + (width * 4 * width + 4 * width) + (4 * width * width + width)
    head = (width**2 + width) + (code * width + width) + 4 * width + 6 * block + 2 * width + width * values + values
    with torch.device("meta"):
        model = UniFork(UniFork.paper())
        codec = sum(p.numel() for p in model.codec.parameters())
        dense = UniFork(dataclasses.replace(UniFork.paper(), shared=24))
    projector = (code * width + width) + (width**2 + width)
    assert model.num_parameters() == 151936 * width + 2 * width + 36 * layer + 2 * width + projector + head + codec
    assert model.num_parameters() - dense.num_parameters() == 12 * layer + width  # "+180M"
    assert 12 * layer == pytest.approx(180e6, rel=0.02)
    assert vila_u().downsample == 16 and model.codec.layout(384, 384).count == 576 * 4


def reached(term: str, task: str) -> set[str]:
    model = build()
    losses = model.loss(model.collate([document(task, 1)]), torch.Generator().manual_seed(0))
    losses.sums[term].backward()
    return {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def test_each_task_has_its_branch() -> None:
    text, image = reached("text", "question"), reached("image", "edit")
    shared = {n for n, _ in tiny().named_parameters() if n.startswith(("trunk.layers.0.", "projector.", "edges."))}
    assert shared <= text & image  # both read pictures
    upper = {n for n, _ in tiny().named_parameters() if n.startswith(("trunk.layers.1.", "trunk.norm"))}
    for route, found in ((UNDERSTAND, text), (GENERATE, image)):
        assert found & upper == {n for n in upper if f".{route}." in n.removeprefix("trunk.layers.1")}
    assert not {n for n in text if n.startswith(("depth_head", "codec"))}
    assert not {n for n in image if n.startswith(("head", "codec"))}


@torch.no_grad()
def test_tuning_one_branch_leaves_the_other_alone() -> None:
    """Bit by bit, also in documents with targets of both kinds."""
    model = build()
    documents = [document(t, 2) for t in ("question", "plan", "draw")]
    before = model.score(documents)
    tuned = trained_names(model, load_recipe(RECIPE).stages[2])
    assert {n.split(".")[0] for n in tuned} == {"trunk", "depth_head"}
    for n in tuned:
        model.get_parameter(n).add_(0.1)
    after = model.score(documents)
    for one, two, kinds in zip(before.values, after.values, before.kinds, strict=True):
        for kind in set(kinds):
            at = torch.tensor([k == kind for k in kinds])
            assert torch.equal(one[at], two[at]) == (kind == "text")


# -- documents of both tasks ------------------------------------------------------------------------------------------

def test_a_document_is_learnt_once_per_branch() -> None:
    model, plan, story = tiny(), document("plan", 0), document("story", 0)
    for d in (document("draw", 0), document("caption", 0)):
        assert model.samples(d) == [d]
    read, draw = model.samples(plan)
    assert [p.target for p in read] == [False, True] and [p.target for p in draw] == [False, False, True]
    assert [len(s) for s in model.samples(story)] == [len(story) - 1, len(story)]
    batch = model.collate([plan, story])
    routes = [set(batch.page.tokens.route[batch.page.tokens.valid()].tolist())]
    assert routes == [{UNDERSTAND, GENERATE}]
    losses = model.loss(batch, torch.Generator().manual_seed(0))
    assert batch.counts == {k: float(v) for k, v in losses.counts.items()}
    assert losses.counts["image"] == 5 * 16 * 2  # pictures, cells, depth


def test_decisions_are_in_the_order_of_the_document() -> None:
    score = tiny().score([document("story", 0)])
    runs = [k for i, k in enumerate(score.kinds[0]) if i == 0 or score.kinds[0][i - 1] != k]
    assert runs == ["code", "text"] * 3 + ["code"]


def test_targets_are_filled_by_their_branch() -> None:
    """It has read everything before, in its own way."""
    model, d = build(), document("plan", 1)
    read: list[tuple[int | None, bool]] = []
    run = model.run

    def listen(works: list[Any]) -> list[Any]:
        for work in works:
            read.extend((w.reader.branch, bool(w.writer.codes)) for w in
                        (work.works if isinstance(work, Together) else [work]) if isinstance(w, Read))
        return run(works)

    model.run = listen  # type: ignore[method-assign]
    filled = model.generate([d.prompt()], Sampling(text=TextSampling(max_tokens=2)))[0]
    branches = [b for b, _ in read]
    assert branches == sorted(branches, key=lambda b: b or 0) and set(branches) == {UNDERSTAND, GENERATE}
    assert all(b == GENERATE for b, coded in read if coded)
    assert [p.target for p in filled] == [p.target for p in d] and not any(p.empty for p in filled)


def test_a_drawn_picture_is_read_by_being_drawn() -> None:
    model, story = tiny(), document("story", 0)
    w, pictures, _ = model.write(model.samples(story)[1])
    assert len(pictures) == 4 == len(w.codes) and all(drawn for _, drawn in w.codes)
    w = model.write(model.samples(story)[0])[0]
    assert len(w.codes) == 3 and not any(drawn for _, drawn in w.codes)


# -- drawing ----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_drawing_is_training() -> None:
    """The codes drawn step by step are those that the teacher-forced pass would draw from the same numbers."""
    model, d = tiny(), document("draw", 4)
    sampling = Sampling(guidance=Guidance())
    found: list[torch.Tensor] = []
    decode = model.decode
    model.decode = lambda x, grid: (found.append(x[0]), decode(x, grid))[1]  # type: ignore[method-assign]
    model.generate([d.prompt()], sampling, seeds=3)
    del model.decode
    uniforms = torch.rand(16, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    batch = model.collate([d])
    hidden = model.forward_page(batch.page, [], found[0])
    logits = model.depth_head(pick(hidden, batch.page.tokens, batch.page.questions), model.codec.code_vectors(found[0]))
    again = next_token.choose(next_token.log_probs(logits, sampling.codes), uniforms)
    assert (again == found[0]).float().mean() > 0.95  # but for a number between two sums of probabilities


@torch.no_grad()
def test_every_depth_is_guided() -> None:
    model = tiny()
    hidden = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    chain = Guidance(branches=(Branch(context="no_text", scale=4.0),))
    program = model.pick_code({"full": hidden[:1], "no_text": hidden[1:]}, torch.tensor([0.2, 0.9]),
                              Sampling(guidance=chain), 0.0)
    work, codes = next(program), torch.zeros(0, dtype=torch.long)
    for u in (0.2, 0.9):
        assert isinstance(work, Deepen) and torch.equal(work.codes, codes)
        vectors = model.codec.code_vectors(codes.expand(2, -1)) if len(codes) else torch.zeros(2, 0, 16)
        logits = model.depth_head(hidden, vectors)[:, -1]
        answer = model.run([work])[0]
        torch.testing.assert_close(answer, logits)
        scores = (logits[1] + 4 * (logits[0] - logits[1])).log_softmax(-1)
        codes = torch.cat((codes, next_token.choose(scores[None], torch.tensor([u]))))
        try:
            work = program.send(answer)
        except StopIteration as stop:
            assert torch.equal(stop.value, codes)


def test_the_negative_prompt_stands_in_place_of_the_text() -> None:
    model = build(negative="a blurred picture", drop_text=1.0)
    v, m, d = model.need_vocabulary(), model.marks, document("draw", 0)
    wanted = [m.start, *v.encode("a blurred picture"), m.end, m.image_start]
    assert model.collate([d]).page.ids[0, : len(wanted)].tolist() == wanted
    assert m.image_start == 1024 and m.image_end == 1025  # no words
    plain = build(drop_text=1.0).collate([d]).page.ids[0]
    assert plain[0] == m.image_start


# -- config, checkpoints ----------------------------------------------------------------------------------------------

def test_what_does_not_fit_is_an_error() -> None:
    c = UniFork.tiny()
    with pytest.raises(ValueError, match=r"head.depth, values, code_width and hidden_width to be \(2, 64, 16, 64\)"):
        dataclasses.replace(c, head=dataclasses.replace(c.head, depth=3))
    with pytest.raises(ValueError, match="residual quantizer with a depth"):
        dataclasses.replace(c, codec=type(c.codec).small())
    with pytest.raises(ValueError, match="0 to 2 shared layers, got 3"):
        build(shared=3)
    with pytest.raises(ValueError, match="expected pixels"):
        tiny().collate([Document((Image(), Text(text="what ?"), Text(text="a cube", target=True)))])


@pytest.mark.parametrize("shared", [0, 1, 3])
def test_the_rules_place_every_tensor(shared: int) -> None:
    """Of other sizes than the golden's, both ways."""
    c = UniFork.tiny()
    model = build(depth=4, shared=shared, tie_embeddings=False, block=dataclasses.replace(c.block, heads=4))
    rules = unifork.rules(LanguageConfig(block=model.config.block, depth=4, vocabulary_size=1024), shared)
    own = {k: v for k, v in model.state_dict().items() if not k.startswith(("codec.", "depth_head."))}
    theirs = to_theirs(own, rules)
    each = 14  # tensors of a layer, with norms of queries and keys
    assert sum(k.startswith("model.gen_fork_layers.") for k in theirs) == (4 - shared) * each
    assert f"model.gen_fork_layers.{3 - shared}.mlp.up_proj.weight" in theirs
    back, report = to_ours(theirs, rules, {k: v.shape for k, v in own.items()})
    assert not report and all(torch.equal(v, back[k]) for k, v in own.items())


def test_every_golden_case() -> None:
    cases = parity.run("unifork", GOLDEN)
    assert [c.name for c in cases if not c.passed] == []
    assert len(cases) == 21 and max(c.absolute for c in cases if not c.name.endswith("255")) < 5e-5


@pytest.mark.parametrize(("key", "hit", "spared"), [
    ("model.gen_fork_layers.1.mlp.up_proj.weight", {"train.loss_gen", "branches.generation_hidden"},
     {"train.loss_und", "branches.understanding_hidden"}),
    ("model.mm_projector.token_embedding.weight", {"train.gen_inputs_embeds", "sample.guided_logits_last"},
     {"branches.generation_hidden"}),
])
def test_one_wrong_weight_is_noticed(key: str, hit: set[str], spared: set[str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "unifork"))
    tensors = load_file(folder / "weights.safetensors")
    tensors[key] = tensors[key] + 0.1 * torch.randn(tensors[key].shape, generator=torch.Generator().manual_seed(0))
    save_file(tensors, folder / "weights.safetensors")
    failed = {c.name for c in parity.run("unifork", folder) if not c.passed}
    assert hit <= failed and not spared & failed


RECIPE = Path(__file__).parents[1] / "recipes" / "unifork.yaml"


def test_the_recipe_is_read() -> None:
    recipe = load_recipe(RECIPE)
    with torch.device("meta"):
        model = UniFork(UniFork.small())
    assert recipe.system == "unifork" and [s.name for s in recipe.stages] == ["adapt", "unify", "draw", "see"]
    draw, see = (trained_names(model, stage) for stage in recipe.stages[2:])
    assert not draw & see and not any(n.startswith(f"trunk.layers.{i}.") for i in range(4) for n in draw | see)
    upper = {n for n, _ in model.named_parameters() if n.startswith(("trunk.layers.4", "trunk.norm"))}
    assert upper <= draw | see
