"""Harmon: published outputs, the shared encoder, and drawing in sets."""
import dataclasses
import json
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from filling import filled
from safetensors.torch import load_file, save_file
from torch import Tensor

from diptych.adapters import harmon, parity
from diptych.adapters.harmon import Rule
from diptych.adapters.keys import to_theirs
from diptych.document import Document, Image, Text
from diptych.objectives import masked_autoregression
from diptych.objectives.guidance import Branch, Guidance
from diptych.parts.interleave import Page
from diptych.parts.tokens import Mode
from diptych.systems.base import Event, Sampling
from diptych.systems.harmon import Harmon, Sketch
from diptych.systems.works import Read, Reader, Reveal
from diptych.world.tasks import document

GOLDEN = Path(__file__).parent / "goldens" / "harmon"


@cache
def system(**changes: float) -> Harmon:
    """Tiny, with everything that starts at zero filled in."""
    torch.manual_seed(0)
    return filled(Harmon(dataclasses.replace(Harmon.tiny(), **changes)))  # type: ignore[arg-type]


# -- published outputs -------------------------------------------------------------------------------------------------

def test_all_published_outputs_are_reproduced() -> None:
    cases = parity.run("harmon", GOLDEN)
    names = {c.name for c in cases}
    assert all(c.passed and c.tolerance <= 2e-4 for c in cases), parity.table(cases)
    stored = {k.replace(".output.", ".") for k in load_file(GOLDEN / "golden.safetensors") if ".output." in k}
    assert names == stored and len(names) == 65
    assert max(c.absolute for c in cases) < 5e-5


def other_sizes(folder: Path) -> Harmon:
    """A folder in the published layout with other numbers everywhere, and the model in it."""
    about = json.loads((GOLDEN / "config.json").read_text())
    about["llm"] |= {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1,
                     "intermediate_size": 40, "vocab_size": 50, "tie_word_embeddings": False}
    about["mar"] |= {"decoder_embed_dim": 24, "decoder_num_heads": 3, "decoder_depth": 1, "encoder_depth": 3,
                     "buffer_size": 2, "diffloss_d": 1, "num_sampling_steps": "4,6", "vae_embed_dim": 3}
    about["vae"] |= {"ch_mult": [1, 2, 1], "embed_dim": 3, "num_res_blocks": 2, "attn_resolutions": [12, 3]}
    torch.manual_seed(0)
    model = Harmon(harmon.config_of(about))
    theirs = to_theirs(model.state_dict(), harmon.rules(model.config)) | {harmon.CLASSES: torch.zeros(7, 40)}
    save_file({k.removeprefix("vae."): v for k, v in theirs.items() if k.startswith("vae.")},
              folder / "kl16.safetensors")
    save_file({k: v.contiguous() for k, v in theirs.items() if not k.startswith("vae.")},
              folder / "weights.safetensors")
    (folder / "config.json").write_text(json.dumps(about))
    return model


def test_every_published_tensor_has_one_home(tmp_path: Path) -> None:
    model = other_sizes(tmp_path)
    names = load_file(tmp_path / "weights.safetensors")
    assert {"llm.lm_head.weight", "mar.encoder_blocks.2.attn.qkv.weight", "proj_out.2.bias",
            "mar.diffloss.net.res_blocks.0.adaLN_modulation.1.weight", "mar.decoder_blocks.0.norm2.bias"} <= set(names)
    assert names["mar.decoder_blocks.0.attn.qkv.weight"].shape == (72, 24)
    assert {"encoder.down.0.attn.1.q.weight", "encoder.down.2.attn.0.q.weight", "post_quant_conv.bias"} <= \
        set(load_file(tmp_path / "kl16.safetensors"))
    again = harmon.load(tmp_path)
    assert again.config == model.config and len(again.sampler.steps) == 10
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    published = load_file(GOLDEN / "weights.safetensors")
    back = to_theirs(harmon.load(GOLDEN).state_dict(), harmon.rules(harmon.load(GOLDEN).config))
    assert all(torch.equal(published[k], v) for k, v in back.items() if not k.startswith("vae."))
    assert set(published) - set(back) == {harmon.CLASSES, "llm.lm_head.weight"}


def test_fused_projections_are_cut_and_joined() -> None:
    rules = [Rule(("qkv",), n, part=(i, 3)) for i, n in enumerate("qkv")]
    ours = {n: torch.randn(2, 4) for n in "qkv"}
    assert torch.equal(to_theirs(ours, rules)["qkv"], torch.cat([ours[n] for n in "qkv"]))


@pytest.mark.parametrize("name, broken", [
    ("mar.decoder_blocks.1.attn.proj.weight", {"mar_base.decoder", "t2i_base.loss", "gen_nocfg.latents"}),
    ("mar.diffloss.net.final_layer.linear.bias", {"diffloss.net", "sample_cfg.x", "mar_class.loss"}),
    ("proj_in.2.weight", {"und.logits", "und_greedy.logits", "gen_cfg_linear.first_condition"}),
])
def test_one_wrong_weight_fails(name: str, broken: set[str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "harmon"))
    tensors = load_file(folder / "weights.safetensors")
    tensors[name].view(-1)[0] += 0.1
    save_file(tensors, folder / "weights.safetensors")
    cases = parity.run("harmon", folder)
    failed = {c.name for c in cases if not c.passed}
    assert broken <= failed and not failed & {"vae.latents", "mar_base.encoder", "schedule.betas_1000"}


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    about = json.loads((GOLDEN / "config.json").read_text())
    for group, key, value in (("mar", "patch_size", 2), ("diffusion", "noise_schedule", "linear"),
                              ("llm", "hidden_act", "gelu")):
        with pytest.raises(ValueError, match=f"expected {group}.{key} to be .*got {value!r}"):
            harmon.config_of(about | {group: about[group] | {key: value}})
    other_sizes(tmp_path)
    tensors = load_file(tmp_path / "weights.safetensors")
    del tensors["mar.z_proj.bias"]
    save_file(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"published layout of Harmon .* 1 missing \(mar.z_proj.bias\)"):
        harmon.load(tmp_path)
    with pytest.raises(ValueError, match="mar.token_width to be 24, .* got 16"):
        dataclasses.replace(Harmon.tiny(), mar=dataclasses.replace(Harmon.tiny().mar, token_width=16))


# -- training ---------------------------------------------------------------------------------------------------------

def gradient(of: Harmon, documents: Sequence[Document], name: str) -> Tensor:
    of.zero_grad()
    of.loss(of.collate(documents), torch.Generator().manual_seed(0)).total().backward()
    grad = of.get_parameter(name).grad
    assert grad is not None
    return grad.clone()


def test_the_encoder_learns_less_from_reading_than_from_drawing() -> None:
    full, tenth = system(gradient_scale=1.0), system(gradient_scale=0.1)
    for name in ("mar.z_proj.weight", "proj_in.0.weight"):
        question, draw = [document("question", 0)], [document("draw", 0)]
        torch.testing.assert_close(gradient(tenth, question, name), 0.1 * gradient(full, question, name))
        assert torch.equal(gradient(tenth, draw, name), gradient(full, draw, name))


def test_hidden_tokens_are_left_out_and_the_others_close_up() -> None:
    s = system()
    batch = s.collate([document("draw", 0), document("edit", 1)])
    assert batch.counts == {"image": 32.0, "variance": 32.0}
    hidden = [torch.zeros(16, dtype=torch.bool).index_fill(0, torch.tensor(gone), True)
              for gone in ([0, 3, 15], list(range(16)))]
    tokens = s.thinned(batch.page.tokens, hidden)
    noise = (batch.page.tokens.mode == Mode.NOISE).flatten()
    assert int(noise.sum()) == 40 and int((noise & tokens.valid().flatten()).sum()) == 13 + 4 + 0 + 4
    assert torch.equal(tokens.valid().flatten()[~noise], batch.page.tokens.valid().flatten()[~noise])
    places = tokens.position.flatten(0, 1)[noise & tokens.valid().flatten(), 0]
    assert torch.equal(places[:17], places[0] + torch.arange(17)) and torch.equal(places[17:], places[17] +
                                                                                 torch.arange(4))


def test_buffers_come_last_in_the_language_model() -> None:
    s, states = system(), torch.randn(1, 7, 64)  # 4 buffers, 3 tokens
    told = s.to_language(states)
    torch.testing.assert_close(told[:, 3:], s.proj_in(states[:, :4]))
    torch.testing.assert_close(told[:, :3], s.proj_in(states[:, 4:]))
    said = torch.randn(1, 7, 64)
    torch.testing.assert_close(s.from_language(states, said)[:, :4], states[:, :4] + s.proj_out(said[:, 3:]))


def test_a_dropped_prompt_leaves_the_null_prompt() -> None:
    s = system(drop_text=1.0)
    batch = s.collate([document("draw", 0)])
    v = s.need_vocabulary()
    words = batch.page.ids[0][: 2 + len(v.encode("Generate an image."))].tolist()
    assert words == [s.marks.start, *v.encode("Generate an image."), s.marks.end]
    assert batch.page.tokens.mode[0, len(words)] == Mode.NOISE


# -- drawing ----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_a_set_is_drawn_from_what_training_computes() -> None:
    """Cached against one pass over the whole document, behind a picture and a text."""
    s, d = system(), document("edit", 3)
    w, pictures, views = s.write(d)
    x = s.encode(pictures)[0][None]
    hidden = torch.arange(16)[None] % 3 != 0
    states = s.mar.encode(x, hidden, (4, 4))
    page = Page.of([[w]])
    page = dataclasses.replace(page, tokens=s.thinned(page.tokens, list(hidden)))
    said = s.trunk(s.states(page, s.see(views), s.to_language(states)[0]), page.tokens, s.mask)[1]
    wanted = s.mar.decode(s.from_language(states, said[None]), hidden, (4, 4))[0]

    reader = Reader()
    first = s.writer(reader)
    first.feature(0, s.feature_count(views[0]))
    s.run([Read(reader, first, views)])
    second = s.writer(reader)
    second.text(s.spell(d.pieces[1]))
    s.run([Read(reader, second)])
    work = Reveal([reader, Reader()], x[0].masked_fill(hidden[0, :, None], 7.0), hidden[0], hidden[0], (4, 4),
                  None)  # type: ignore[arg-type]
    own, null = s.conditions([work])[0]
    torch.testing.assert_close(own, wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(null, wanted, atol=1e-3)
    assert reader.context.length == 20 + len(second.ids)  # nothing of the drawing stays


def drawn(sampling: Sampling, events: list[Event] | None = None) -> Tensor:
    d = Document((Text(text="a red circle"), Image(target=True, role="assistant")))
    emit = None if events is None else lambda i, event: events.append(event)
    return torch.from_numpy(system().generate([d], sampling, seeds=5, emit=emit)[0].pieces[1].pixels)  # type: ignore[attr-defined]


def test_options_of_sampling_act() -> None:
    usual = drawn(Sampling(evaluations=3))
    assert usual.shape == (3, 64, 64) and torch.equal(usual, drawn(Sampling(evaluations=3)))
    chain = Guidance(branches=(Branch(context="no_text", scale=3.0),))
    guided = drawn(Sampling(evaluations=3, guidance=chain))
    linear = drawn(Sampling(evaluations=3, guidance=dataclasses.replace(chain, schedule="linear")))
    others = [guided, linear, drawn(Sampling(evaluations=4)), drawn(Sampling(evaluations=3, temperature=0.5))]
    assert all(not torch.allclose(a, b, atol=1e-3) for i, a in enumerate([usual, *others]) for b in others[i:])
    assert drawn(Sampling(evaluations=3, size=(32, 64))).shape == (3, 32, 64)


def test_more_sets_than_tokens_are_no_harm_and_partial_pictures_show() -> None:
    events: list[Event] = []
    assert torch.isfinite(drawn(Sampling(evaluations=40, partial=4), events)).all()
    assert [e.kind for e in events[-2:]] == ["partial", "picture"] and len(events) > 3


@pytest.mark.parametrize("count", [12, 16])
def test_hidden_tokens_are_averaged_per_picture(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever share is hidden, a picture counts all its tokens: counts are known before anything is drawn."""
    s, hidden = system(), torch.arange(16).expand(2, -1) < count
    states, x = torch.zeros(2, 4 + 16 - count, 64), torch.randn(2, 16, 24)
    monkeypatch.setattr(masked_autoregression, "loss", lambda head, diffusion, x, *rest: tuple(
        torch.full((len(x),), value) for value in (2.0, 3.0)))
    assert s.error(Sketch([0, 1], x, hidden, (4, 4), states), states, torch.Generator()) == [2 * 32, 3 * 32]
