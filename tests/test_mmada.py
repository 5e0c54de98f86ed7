"""MMaDA: sizes, one mask, layouts and chats, what is hidden and learnt, pads, scores, blocks of texts, guidance,
inpainting, checkpoints, golden cases."""
import dataclasses
import json
import shutil
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diptych.adapters import keys, mmada, mmada_cases, parity, published
from diptych.adapters.convert import export, export_folder, import_folder
from diptych.document import Document, Image, Text
from diptych.objectives import masked_diffusion, masked_token
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_token import TextSampling, TokenSampling
from diptych.parts.interleave import IGNORE
from diptych.parts.tokens import Modality
from diptych.parts.turns import Turns
from diptych.systems.base import Sampling
from diptych.systems.mmada import TURNS, Mmada
from diptych.systems.works import Guess, Sequenced
from diptych.training.recipe import load_recipe
from diptych.world.tasks import document

GOLDEN = Path(__file__).parent / "goldens" / "mmada"
QUICK = Sampling(evaluations=3, text=TextSampling(steps=3, block=16))


def build(**changes: Any) -> Mmada:
    torch.manual_seed(0)
    return Mmada(dataclasses.replace(Mmada.tiny(), drop_text=0.0, **changes)).eval()


@cache
def tiny() -> Mmada:
    return build()


@cache
def paper() -> Mmada:
    with torch.device("meta"):
        return Mmada(Mmada.paper())


def spans(model: Mmada, d: Document, index: int, **how: Any) -> list[int | str]:
    """Ids of the texts of a target's sequence, and "codes" for every run of them."""
    w = model.with_target(d, index, **how)[0]
    out: list[int | str] = []
    for token, kind in zip(w.ids, np.concatenate(w.strip.columns["modality"]), strict=True):
        if kind != Modality.CODE:
            out.append(token)
        elif not out or out[-1] != "codes":
            out.append("codes")
    return out


# -- sizes ------------------------------------------------------------------------------------------------------------

def test_the_published_size_by_arithmetic() -> None:
    """LLaDA-8B and a row for every code in the table and the head."""
    width, hidden, tokens = 4096, 12288, 126464 + 8192
    layer = 4 * width**2 + 3 * width * hidden + 2 * width
    model = paper()
    codec = sum(p.numel() for p in model.codec.parameters())
    assert model.values == 8192 and model.embed.num_embeddings == tokens == 134656 and model.stride == 16
    assert model.num_parameters() - codec == 32 * layer + width + 2 * tokens * width == 8_082_690_048


def test_one_mask_for_texts_and_codes() -> None:
    model, s = tiny(), tiny().config.specials
    codes = torch.tensor([0, 63, 64])
    assert torch.equal(model.code_tokens(codes), model.embed.weight[[1031, 1094, s.mask]])
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.code_logits(hidden), model.head(hidden)[:, 1031:])


def test_configs_that_cannot_work_are_errors() -> None:
    for change, message in (({"variant": "his"}, "variant paper or released"), ({"text_size": 1030}, "fix: count")):
        with pytest.raises(ValueError, match=message):
            build(**change)
    with pytest.raises(ValueError, match="fewer than 3 tokens, got .*fix: shorten it"):
        build(slots=3).with_target(document("caption", 0), 2)


# -- documents to sequences -------------------------------------------------------------------------------------------

def test_the_layouts() -> None:
    model, s, m = tiny(), tiny().config.specials, tiny().marks
    block, codes = [m.image_start, "codes", m.image_end], [s.read, m.image_start, "codes", m.image_end]

    def answer(d: Document, index: int) -> list[int]:
        ids = model.spell(d.pieces[index])
        return [m.start, *ids, *[m.end] * (model.config.slots - len(ids))]

    d = document("draw", 0)
    words = [m.start, *model.spell(d.pieces[0]), m.end]
    assert spans(model, d, 1) == [s.draw, *words, *block]
    assert spans(model, d, 1, drop=(True, False, False)) == [s.draw, m.start, m.end, *block]
    d = document("question", 0)
    assert spans(model, d, 2) == [*codes, m.start, *model.spell(d.pieces[1]), m.end, *answer(d, 2)]
    d, words = document("plan", 0), [m.start, *model.spell(document("plan", 0).pieces[0]), m.end]  # boxes lead to it
    assert spans(model, d, 1) == [s.reason, *words, *answer(d, 1)]
    assert spans(model, d, 2) == [s.reason, *words, m.start, *model.spell(d.pieces[1]), m.end, *block]
    assert spans(model, document("edit", 0), 2)[:5] == [*codes, s.draw]
    read = Document((Text(text="a red ring"), Text(text="a ring", target=True)))
    assert spans(model, read, 1)[0] == m.start  # a text alone has no task token


def test_answers_are_asked_in_their_places_and_see_all() -> None:
    model, d = tiny(), document("question", 0)
    w = model.with_target(d, 2)[0]
    assert [i for i in w.labels if i != IGNORE] == w.ids[-model.config.slots:] and w.labels[-1] == model.marks.end
    page = model.collate([d, document("draw", 1)]).page
    together = page.tokens.document[:, :, None] == page.tokens.document[:, None]
    real = page.tokens.valid()
    assert torch.equal(model.mask.dense(page.tokens)[real], (together & real[:, None])[real])


def test_chats() -> None:
    """Turns of a chat, each closed; what only leads to a picture is none."""
    turns = Turns(system=("S:", "#"), user=("U:", "#"), assistant=("A:", "#"), gap="")
    model = build(turns=turns)
    v, m, s = model.need_vocabulary(), model.marks, model.config.specials
    u, a, stop = (v.encode_frame(text) for text in ("U:", "#A:", "#"))
    d = document("question", 0)
    ask, said = v.encode(d.pieces[1].text), v.encode(d.pieces[2].text)  # type: ignore[attr-defined]
    filled = [*said, *stop] + [m.end] * (model.config.slots - len(said) - len(stop))
    assert spans(model, d, 2)[4:] == [m.start, *u, *ask, *a, *filled]
    assert spans(model, document("draw", 0), 1)[:2] == [s.draw, m.start]
    plan = spans(model, document("plan", 0), 2)
    assert plan[:3] == [s.reason, m.start, *u[:1]]
    assert plan[-3 - len(stop) :] == [*stop, m.image_start, "codes", m.image_end]
    assert model.cut([5, *stop, 6], QUICK) == model.cut([5, m.end, 6], QUICK) == [5]
    lead = TURNS.lead(Text(text="hi"), Text(role="assistant", target=True))
    assert lead == "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"


# -- training ---------------------------------------------------------------------------------------------------------

def test_the_loss_by_hand() -> None:
    """Hidden slots weigh 1 / p, hidden codes 1; of each target only what is hidden counts."""
    model = tiny()
    batch = model.collate([document("question", 0), document("draw", 1)])
    losses = model.loss(batch, torch.Generator().manual_seed(5))
    h = model.hide(batch, torch.Generator().manual_seed(5))
    assert losses.counts["text"] == model.config.slots and losses.counts["image"] == h.asked.sum()
    states = model.forward_page(h.page, [], h.codes)
    order = torch.cat(batch.page.tokens.routes(2)).argsort()
    scores = model.head(torch.cat(states))[order].log_softmax(-1)  # one row: by place
    text = -sum(scores[s, w] / p for s, w, f, p in zip(h.slots, h.words, h.hidden, h.p, strict=True) if f)
    places, codes = batch.page.questions[h.asked], h.answers[h.asked]
    assert isinstance(text, Tensor) and batch.page.ids.shape[0] == 1
    torch.testing.assert_close(losses.sums["text"], text, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(losses.sums["image"], -scores[places, 1031 + codes].sum(), rtol=1e-4, atol=1e-3)
    clean = torch.ones(len(order), dtype=torch.bool).index_fill(0, h.slots[h.hidden], False)
    assert torch.equal(h.page.ids.flatten()[clean], batch.page.ids.flatten()[clean])
    assert (h.page.ids.flatten()[~clean] == model.config.specials.mask).all()


def test_pads_of_released_checkpoints_are_seen() -> None:
    """In training they stand before the prompt; a drawing leaves them out. Both marks of the picture are asked."""
    model, paper, d = build(variant="released"), tiny(), document("draw", 1)
    w, plain = (m.with_target(d, 1)[0] for m in (model, paper))
    missing = model.config.prompt - (plain.questions[0] - 1)
    assert missing > 0 and w.ids == [*plain.ids, *[model.config.specials.pad] * missing]
    position = np.concatenate(w.strip.columns["position"])[:, 0]
    assert sorted(position) == list(range(-missing, len(plain.ids))) and w.questions == plain.questions
    tokens = model.collate([d]).page.tokens
    raised = model.mask.bias(tokens)
    assert raised is not None and bool(model.mask.dense(tokens)[0].all())
    real = (tokens.modality[0] != Modality.FILL).float()
    assert torch.equal(raised[0], real[:, None] * real)
    assert model.before(d, 1).writer.ids == paper.before(d, 1).writer.ids
    one, two = (m.loss(m.collate([d]), torch.Generator().manual_seed(0)) for m in (model, paper))
    assert one.counts["image"] == two.counts["image"] + 2


def test_scores_are_those_of_hidden_tokens() -> None:
    model, d = tiny(), document("plan", 0)
    with torch.no_grad():
        score, h = model.score([d], seed=3), model.hide(model.collate([d]), torch.Generator().manual_seed(3))
        losses = model.loss(model.collate([d]), torch.Generator().manual_seed(3))
        half = [model.score([d], seed=seed, share=0.5) for seed in (1, 1, 2)]
    kinds, values = score.kinds[0], score.values[0]
    assert kinds == ["text"] * int(h.hidden.sum()) + ["code"] * int(h.asked.sum())
    text, codes = values.split([kinds.count("text"), kinds.count("code")])
    torch.testing.assert_close(-codes.sum(), losses.sums["image"], atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(-(text / h.p[0]).sum(), losses.sums["text"], atol=1e-3, rtol=1e-5)
    assert half[0].kinds[0].count("code") == 32 and torch.equal(half[0].values[0], half[1].values[0])
    assert half[0].kinds != half[2].kinds or not torch.allclose(half[0].values[0], half[2].values[0])
    story = document("story", 0)  # whose sequences share rows in another order
    kinds = model.score([story], share=1.0).kinds[0]
    assert [(k, len(list(run))) for k, run in groupby(kinds)] == \
        [("code", 64) if isinstance(p, Image) else ("text", 48) for p in story.targets]
    written = [model.with_target(d, i) for i in (1, 2)]
    parts = model.decisions(model.lay_out(written), [w for w, _, _ in written], torch.Generator().manual_seed(3))
    assert all(p.requires_grad for p in parts)  # as reinforcement learning needs them


# -- generating -------------------------------------------------------------------------------------------------------

def dictated(model: Mmada, monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> list[Guess]:
    """Every answer says `ids`, the first ones most surely; returns what was asked."""
    asked: list[Guess] = []

    def told(works: list[Any]) -> list[Any]:
        asked.extend(works)
        logits = torch.zeros((len(ids), model.embed.num_embeddings))
        logits[torch.arange(len(ids)), torch.tensor(ids)] = torch.linspace(60, 40, len(ids))
        return [[logits for _ in w.sequences] for w in works]

    monkeypatch.setattr(model, "run", told)
    return asked


def test_texts_are_said_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model, d = build(), document("caption", 0)
    ids, mask = model.slot_ids(model.spell(d.pieces[2])), model.config.specials.mask
    text = TextSampling(steps=12, block=12)
    assert model.marks.end not in ids[:12]
    asked = dictated(model, monkeypatch, ids)
    said = model.generate([d], Sampling(text=text))[0].pieces[2]
    assert said == d.pieces[2]
    blocks = ids.index(model.marks.end) // 12 + 1  # those behind the end are never asked for
    assert len(asked) == 3 * blocks
    for k, work in enumerate(asked):
        x = work.x.tolist()
        assert x[: 4 * k] == ids[: 4 * k] and set(x[4 * k :]) == {mask} and len(work.sequences) == 1
    short = dataclasses.replace(text, max_tokens=2)
    cut = model.generate([d], Sampling(text=short))[0].pieces[2]
    assert cut.text == model.need_vocabulary().decode(ids[:2])  # type: ignore[attr-defined]


def test_the_order_of_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model, d = build(), document("caption", 0)
    ids, mask = model.slot_ids(model.spell(d.pieces[2])), model.config.specials.mask
    asked = dictated(model, monkeypatch, ids)
    model.generate([d], Sampling(text=TextSampling(steps=2, order="random")))
    assert 4 < sum(i != mask for i in asked[1].x.tolist()[:24]) < 20  # half of all, anywhere


def test_texts_are_guided_by_a_prompt_of_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, d, seen = build(), document("question", 0), list[Sequenced]()
    run = model.run
    monkeypatch.setattr(model, "run", lambda works: seen.extend(s for w in works for s in w.sequences) or run(works))
    guided = dataclasses.replace(QUICK, text_guidance=Guidance(branches=(Branch(context="no_prompt", scale=2.5),)))
    model.generate([d], guided)
    full, bare = seen[:2]
    assert set(bare.writer.ids) == {model.config.specials.mask} and len(bare.writer.ids) == len(full.writer.ids)
    assert full.codes is not None and bare.codes is not None
    assert (bare.codes[0] == model.values).all() and bare.codes[0].shape == full.codes[0].shape
    wrong = Guidance(branches=(Branch(context="no_text", scale=2.0),))
    with pytest.raises(ValueError, match="branches out of no_prompt, got 'no_text'"):
        model.generate([d], dataclasses.replace(guided, text_guidance=wrong))


def test_inpainting_keeps_what_is_known() -> None:
    model, d = build(variant="released"), document("plan", 0)
    picture = torch.from_numpy(d.pieces[2].pixels)  # type: ignore[attr-defined]
    codes, region = model.encode([picture])[0], torch.zeros(8, 8, dtype=torch.bool)
    region[2:5, 3:] = True
    asked: list[Tensor] = []
    run = model.run
    model.run = lambda works: asked.extend(w.x for w in works if isinstance(w, Guess)) or run(works)  # type: ignore
    warm = dataclasses.replace(QUICK, codes=TokenSampling(temperature=1.0))
    drawn = model.inpaint(d, 2, region, warm)
    known = ~region.flatten()
    assert len(asked) == 3 and all(torch.equal(x[known], codes[known]) for x in asked)
    assert (asked[0][~known] == model.values).all() and drawn.pieces[:2] == d.pieces[:2]
    with torch.no_grad():
        kept = model.decode(codes[None], (8, 8))[0]
    assert not np.allclose(drawn.pieces[2].pixels, kept)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"region of \(8, 8\) codes with some"):
        model.inpaint(d, 2, torch.zeros(8, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="drawn picture, got text"):
        model.inpaint(d, 0, region)


def test_log_probs_of_a_drawing_are_those_of_its_steps() -> None:
    """What was drawn, of a text or of a picture, scores the same when the network reads every state again."""
    model, uniforms = tiny(), torch.rand((2, 3, 64), generator=torch.Generator().manual_seed(0))
    mask, warm = model.config.specials.mask, TokenSampling()
    draw = masked_token.fill(torch.full((64,), 64), uniforms[0], uniforms[1], 64, warm, 1.0)
    say = masked_diffusion.fill(torch.full((48,), mask), mask, masked_diffusion.plan(48, 16, 3), warm,
                                uniforms[0, :, :48])
    for task, hidden, chain in (("draw", 64, draw), ("question", mask, say)):
        states, heard = [next(chain)[0]], list[Tensor]()
        with torch.no_grad():
            while len(heard) < 3:
                heard.append(model.run([Guess([asked(model, task)], states[-1])])[0][0])
                try:
                    states.append(chain.send(heard[-1])[0])
                except StopIteration as stop:
                    states.append(stop.value)
            again = model.run([Guess([asked(model, task)], x) for x in states[:-1]])
        count = 0
        for k, (one, two) in enumerate(zip(heard, again, strict=True)):
            own = [masked_token.log_prob(v.log_softmax(-1), states[k], states[k + 1], hidden) for v in (one, two[0])]
            torch.testing.assert_close(own[0], own[1], atol=1e-5, rtol=0)
            count += len(own[0])
        assert count == len(states[0]) and (states[-1] != hidden).all()


def asked(model: Mmada, task: str) -> Sequenced:
    """The sequence of the target of a document."""
    d = document(task, 0).prompt()
    s = model.before(d, len(d) - 1)
    model.write_drawn(s.writer, 0, (8, 8)) if task == "draw" else model.add_answer(s.writer, d, 2, [])
    return s


# -- checkpoints and golden cases -------------------------------------------------------------------------------------

def test_every_golden_case() -> None:
    cases = parity.run("mmada", GOLDEN)
    assert [c.name for c in cases if not c.passed] == []
    assert len(cases) == 79 and max(c.absolute for c in cases) < 5e-5


@pytest.mark.parametrize(("key", "hit"), [
    ("blocks.1.ff_proj.weight", {"forward.logits_bool_bias", "loss_chat.loss_mmu", "text_cfg.logits_step0"}),
    ("blocks.0.k_proj.weight", {"forward.logits_float_bias_row01", "t2i_cfg35.logits_last"}),
])
def test_one_wrong_weight_is_noticed(key: str, hit: set[str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "mmada"))
    tensors = load_file(folder / "weights.safetensors")
    name = f"model.transformer.{key}"
    tensors[name] = tensors[name] + 0.02 * torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(0))
    save_file(tensors, folder / "weights.safetensors")
    failed = {c.name for c in parity.run("mmada", folder) if not c.passed}
    assert hit <= failed and not any(name.startswith(("prompt", "corrupt")) for name in failed)


def test_hidden_and_seen_pads_are_told_apart() -> None:
    """The three masks of the golden logits are far from each other where a row has pads, and equal where not."""
    g = mmada_cases.Golden(GOLDEN)
    rows = g.tensors["forward.input.ids"][:2]
    with torch.no_grad():
        masks = (mmada_cases.ALL & mmada_cases.REAL, mmada_cases.PADS_SEEN, mmada_cases.ALL)
        found = [mmada_cases._logits(g.model, rows, mask)[:, -1] for mask in masks]
    gaps = [(found[a] - found[b]).abs().amax(-1) for a, b in ((0, 1), (1, 2), (0, 2))]
    assert all(gap[0] > 0.01 and gap[1] < 1e-4 for gap in gaps)


def test_the_published_layout_both_ways(tmp_path: Path) -> None:
    """With the tokenizer of Show-o beside the transformer, or as a part; and as a system states itself."""
    folder, shown = tmp_path / "mmada", GOLDEN.parent / "show-o"
    shutil.copytree(GOLDEN, folder, ignore=shutil.ignore_patterns("golden*"))
    with pytest.raises(ValueError, match="MAGVIT-v2 .*, which is published apart.*fix"):
        mmada.load(folder)
    model, theirs = mmada.load(folder, shown), load_file(GOLDEN / "weights.safetensors")
    assert published.find_layout(folder) == ("mmada", "original") and model.config.variant == "released"
    assert mmada.load(folder, shown, "paper").config.variant == "paper"
    import_folder(folder, tmp_path / "ours", parts={"tokenizer": shown})
    export_folder(tmp_path / "ours", tmp_path / "back")
    back = load_file(tmp_path / "back" / "weights.safetensors")
    assert back.keys() == theirs.keys() and all(torch.equal(back[k], theirs[k]) for k in theirs)
    assert (tmp_path / "back" / "config.json").read_bytes() == (GOLDEN / "config.json").read_bytes()
    for name, own in (("theirs", model), ("own", build(codec=model.config.codec))):
        export(own, tmp_path / name)
        again = published.load(tmp_path / name)
        changed = {k for k, v in vars(again.config).items() if v != getattr(own.config, k)}
        assert changed <= {"sampling", "row", "tokenizer", "ends", "drop_text"}, changed
        state = again.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in own.state_dict().items())
    with pytest.raises(ValueError, match="another turns"):
        export(build(turns=Turns()), tmp_path / "chat")
    names = keys.to_theirs(paper().state_dict(), mmada.rules(paper().config))
    assert names["model.transformer.blocks.31.up_proj.weight"].shape == (12288, 4096)
    assert names["model.transformer.ff_out.weight"].shape == (134656, 4096) and len(names) == 32 * 9 + 3


def test_what_does_not_fit_is_an_error(tmp_path: Path) -> None:
    values = json.loads((GOLDEN / "config.json").read_text())
    codec = Mmada.tiny().codec
    assert mmada.config_of(values, codec).prompt == 10
    for change, message in [({"block_type": "sequential"}, "block_type of MMaDA to be 'llama'"),
                            ({"new_vocab_size": 125}, "then 64 codes, got 125"),
                            ({"_extra": None}, "MASK. to be 126336, got 46"),
                            ({"codebook_size": 32, "new_vocab_size": 92, "embedding_size": 92}, "fix: pass the one")]:
        with pytest.raises(ValueError, match=message):
            mmada.config_of(values | change, codec)
    tensors = load_file(GOLDEN / "weights.safetensors")
    del tensors["model.transformer.ln_f.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copyfile(GOLDEN / "config.json", tmp_path / "config.json")
    with pytest.raises(ValueError, match="published layout of MMaDA.*1 missing"):
        mmada.load_transformer(tmp_path, codec)


def test_the_recipe_is_read() -> None:
    recipe = load_recipe(Path(__file__).parents[1] / "recipes" / "mmada.yaml")
    assert recipe.system == "mmada" and [s.name for s in recipe.stages] == ["pretrain", "reason"]
