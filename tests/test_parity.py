"""The parity check itself: it passes on the published outputs, passes on folders of the same format made here with
other sizes and options by an independent implementation, and fails when a single weight is off."""
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bagel_reference import Reference
from safetensors.torch import load_file, save_file
from torch import Tensor

from diptych.adapters import bagel, convert, parity
from diptych.adapters.cases import Case
from diptych.adapters.keys import Rule, expand, to_ours, to_theirs
from diptych.cli.main import main
from diptych.parts.blocks import BlockConfig
from diptych.parts.interleave import Marks
from diptych.parts.vae import AutoEncoderConfig
from diptych.parts.vision import VisionConfig
from diptych.systems.bagel import Bagel, BagelConfig

GOLDEN = Path(__file__).parent / "goldens" / "bagel"
MARKS = {"bos_token_id": 60, "eos_token_id": 61, "start_of_image": 62, "end_of_image": 63}
EDIT = "image(vae+vit) then text, text cfg 3.0, image cfg 1.5, renorm {renorm}, 32x48"
CODEC = AutoEncoderConfig(channels=32, channel_mult=(1, 2, 1), num_res_blocks=1, latent_channels=3, shift=0.2,
                          scale=0.7)


def config(*, heads: int, kv: int, head: int, depth: int, **changes: Any) -> BagelConfig:
    width = heads * head
    block = BlockConfig(width=width, heads=heads, kv_heads=kv, head_dim=head, hidden=40, qkv_bias=True, norm_eps=1e-5,
                        qk_norm=changes.pop("qk_norm", True))
    vision = VisionConfig(width=24, mlp_width=32, num_layers=3, num_heads=3, patch=8, max_side=6, norm_eps=1e-5,
                          interpolate=changes.pop("interpolate", False))
    marks = Marks(*MARKS.values())
    return BagelConfig(block=block, depth=depth, vocabulary_size=64, vision=vision, codec=CODEC, marks=marks,
                       latent_table_side=7, **changes)


FOLDERS: dict[str, tuple[BagelConfig, dict[str, Any]]] = {
    "dense, tied, interpolated": (
        config(heads=6, kv=3, head=8, depth=3, coupling="dense", tie_embeddings=True, interpolate=True, rope_theta=5e2),
        {"num_timesteps": 5, "timestep_shift": 1.5, "cfg_interval": [0.3, 0.9], "cfg_renorm_min": 0.4, "cases": {
            "draw": "text only, 48x32 (HxW)", "guided": "text cfg 2.5, renorm channel",
            "edit": EDIT.format(renorm="global")}}),
    "mixture, no qk norm": (
        config(heads=4, kv=1, head=16, depth=2, qk_norm=False, latent_patch=1, rope_theta=1e4),
        {"num_timesteps": 4, "timestep_shift": 1.0, "cfg_interval": [0.0, 1.0], "cases": {
            "guided": "text cfg 5.0, renorm global", "edit": EDIT.format(renorm="channel"),
            "look": "image(vit only) then text, text cfg 2.0, image cfg 2.0, renorm text_channel"}}),
    "mixture, many queries per key": (
        config(heads=8, kv=2, head=8, depth=1, interpolate=True, time_shift=2.0),
        {"num_timesteps": 3, "timestep_shift": 4.0, "cfg_interval": [0.5, 0.8], "cases": {
            "copy": "image(vae only) then text, text cfg 2.0, image cfg 3.0, renorm channel",
            "edit": EDIT.format(renorm="text_channel")}}),
}


@torch.no_grad()
def expected_outputs(folder: Path, about: dict[str, Any], golden: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every golden output, from the files of the folder and the inputs in `golden`, by the reference."""
    marks = about["special_tokens"]
    ref = Reference(folder, marks)
    bos, eos = marks["bos_token_id"], marks["eos_token_id"]
    vit, prompt = ("vit", golden["image_vit"]), ("text", [bos, *golden["prompt_ids"].tolist(), eos])
    latent = ref.encode(golden["image_vae"])
    out = {"vit_features": ref.features(golden["image_vit"]), "vae_encode_mean": latent}
    ids, logits = [bos], []
    for _ in range(12):
        logits.append(ref.logits([vit, prompt, ("text", ids)])[-1])
        ids.append(int(logits[-1].argmax()))
    out |= {"und_ids": torch.tensor(ids[:12]), "und_logits": torch.stack(logits)}
    for name, text in about["cases"].items():
        if f"{name}_noise" not in golden:
            continue
        images = []
        if "vae" in text.split("then")[0]:
            images.append(("vae", (ref.tokens(latent), ref.latent_grid(latent), 0.0)))
        if "vit" in text.split("then")[0]:
            images.append(vit)
        scales = {k: float(m[1]) if (m := re.search(rf"{k} cfg ([\d.]*\d)", text)) else 1.0 for k in ("text", "image")}
        renorm = re.search(r"renorm (\w+)", text)
        options = {"steps": about["num_timesteps"], "shift": about["timestep_shift"], "interval": about["cfg_interval"],
                   "floor": about.get("cfg_renorm_min", 0.0), "renorm": renorm[1] if renorm else "global", **scales}
        contexts = {"full": [*images, prompt], "no_text": images, "no_image": [prompt]}
        grid = tuple(golden[f"{name}_grid"].tolist())
        x = ref.draw(golden[f"{name}_noise"], grid, contexts, options)
        out |= {f"{name}_latent_tokens": x, f"{name}_pixels": ref.decode(ref.cells_of(x, grid))}
    return out


def make_folder(folder: Path, kind: str, seed: int) -> None:
    """A folder in the published layout: random weights, random inputs, and the outputs of the reference."""
    c, about = FOLDERS[kind]
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    torch.manual_seed(seed)
    model = Bagel(c)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_((0.15 if p.ndim > 1 and "codec" not in name else 0.05) * normal(*p.shape))
    convert.export(model, folder)
    height, width = (24, 32) if c.latent_patch == 2 else (16, 24)
    golden = {"prompt_ids": torch.randint(0, 60, (5,), generator=generator), "image_vit": normal(3, 24, 40).tanh(),
              "image_vae": normal(3, height, width).tanh()}
    stride = model.stride
    for name, text in about["cases"].items():
        size = re.search(r"(\d+)x(\d+)", text)
        grid = (int(size[1]) // stride, int(size[2]) // stride) if size and c.latent_patch == 2 else (3, 2)
        golden |= {f"{name}_noise": normal(grid[0] * grid[1], model.token_width), f"{name}_grid": torch.tensor(grid)}
    about = {"special_tokens": MARKS, **about}
    golden |= expected_outputs(folder, about, golden)
    save_file({k: v.contiguous() for k, v in golden.items()}, folder / "golden.safetensors")
    (folder / "golden.json").write_text(json.dumps(about))


# -- published outputs -------------------------------------------------------------------------------------------------

def test_all_published_outputs_are_reproduced() -> None:
    cases = parity.run("bagel", GOLDEN)
    names = [c.name for c in cases]
    assert len(names) == 12 and {"vit_features", "vae_encode_mean", "und_logits", "edit_pixels"} <= set(names)
    assert all(c.passed and c.tolerance <= 2e-4 for c in cases), parity.table(cases)
    assert max(c.absolute for c in cases) < 2e-5  # ten times better than asked


def test_the_reference_reproduces_the_published_outputs_too() -> None:
    """Which makes it a judge for the folders below."""
    golden, about = load_file(GOLDEN / "golden.safetensors"), json.loads((GOLDEN / "golden.json").read_text())
    for name in about["cases"]:
        if f"{name}_noise" in golden:
            height, width = golden[f"{name}_pixels"].shape[2:]
            golden[f"{name}_grid"] = torch.tensor([height // 16, width // 16])
    for name, value in expected_outputs(GOLDEN, about, golden).items():
        torch.testing.assert_close(value, golden[name], atol=2e-4, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", FOLDERS)
def test_other_sizes_and_options_agree_with_the_reference(kind: str, tmp_path: Path) -> None:
    make_folder(tmp_path, kind, seed=len(kind))
    cases = parity.run("bagel", tmp_path)
    assert all(c.passed for c in cases), parity.table(cases)
    drawn = [c for c in cases if c.name.endswith("_latent_tokens")]
    assert len(drawn) == len(FOLDERS[kind][1]["cases"])
    golden = load_file(tmp_path / "golden.safetensors")
    for c in drawn:  # something was drawn
        assert (golden[c.name] - golden[c.name.replace("latent_tokens", "noise")]).abs().max() > 0.1


# -- failing -----------------------------------------------------------------------------------------------------------

@pytest.fixture()
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "bagel"))


def edit(folder: Path, file: str, name: str) -> None:
    tensors = load_file(folder / file)
    tensors[name].view(-1)[0] += 0.1
    save_file(tensors, folder / file)


@pytest.mark.parametrize("file, name, broken", [
    ("ema.safetensors", "vit_model.vision_model.encoder.layers.1.mlp.fc1.weight", {"vit_features", "und_logits"}),
    ("ema.safetensors", "language_model.model.layers.1.self_attn.q_norm_moe_gen.weight", {"edit_latent_tokens"}),
    ("ae.safetensors", "decoder.mid.attn_1.k.weight", {"t2i_nocfg_pixels", "edit_pixels"}),
])
def test_one_wrong_weight_fails(copy: Path, file: str, name: str, broken: set[str],
                                capsys: pytest.CaptureFixture[str]) -> None:
    edit(copy, file, name)
    assert main(["parity", "bagel", str(copy)]) == 1
    printed = capsys.readouterr().out
    failed = {line.split()[0] for line in printed.splitlines() if line.endswith("FAIL")}
    assert broken <= failed


def test_the_command_prints_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "bagel", str(GOLDEN)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" ok") == 12 and "FAIL" not in printed and "largest error against its tolerance" in printed
    assert main(["parity", "bagle", str(GOLDEN)]) == 2
    assert "did you mean 'bagel'" in capsys.readouterr().err
    assert main(["parity", "bagel", str(GOLDEN / "gone")]) == 2


def test_a_case_that_is_not_a_number_fails() -> None:
    case = Case.compare("x", torch.tensor([float("nan")]), torch.tensor([1.0]), 2e-4)
    assert not case.passed
    with pytest.raises(ValueError, match=r"expected x of shape \(1,\), got \(2,\)"):
        Case.compare("x", torch.zeros(2), torch.zeros(1), 1.0)


# -- import and export -------------------------------------------------------------------------------------------------

def load(folder: Path) -> Bagel:
    s = json.loads((GOLDEN / "golden.json").read_text())["special_tokens"]
    return bagel.load(folder, Marks(s["bos_token_id"], s["eos_token_id"], s["start_of_image"], s["end_of_image"]))


def test_export_gives_the_published_files_back(tmp_path: Path) -> None:
    model = load(GOLDEN)
    convert.export(model, tmp_path)
    for file in ("ema.safetensors", "ae.safetensors"):
        theirs, back = load_file(GOLDEN / file), load_file(tmp_path / file)
        assert set(back) == set(theirs)
        for name, value in theirs.items():
            if name.endswith("pos_embed.pos_embed"):  # fixed tables, made anew
                torch.testing.assert_close(back[name], value, atol=1e-6, rtol=0)
            else:
                assert torch.equal(back[name], value), name
    for file in ("llm_config.json", "vit_config.json", "config.json"):
        theirs, back = (json.loads((f / file).read_text()) for f in (GOLDEN, tmp_path))
        for one, two in ((theirs, back), (theirs.get("vae_config", {}), back.get("vae_config", {}))):
            assert all(one[k] == v for k, v in two.items() if k in one and k != "vae_config")
    again = load(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_the_depth_of_the_tower_is_that_of_its_weights(copy: Path) -> None:
    """The release states 27 layers and has 26."""
    about = json.loads((copy / "vit_config.json").read_text())
    (copy / "vit_config.json").write_text(json.dumps(about | {"num_hidden_layers": 3}))
    assert load(copy).config.vision.num_layers == 2


def test_what_does_not_fit_is_named(copy: Path, tmp_path: Path) -> None:
    tensors = load_file(copy / "ema.safetensors")
    wrong = {k: v for k, v in tensors.items() if k != "vae2llm.bias"} | {"extra": torch.zeros(1)}
    wrong["connector.fc1.weight"] = torch.zeros(64, 47)
    save_file(wrong, copy / "ema.safetensors")
    wanted = r"1 missing \(vae2llm.bias\); 1 unexpected \(extra\); 1 reshaped \(connector.fc1"
    with pytest.raises(ValueError, match=wanted):
        load(copy)
    for file, key, value, message in [
        ("llm_config.json", "layer_module", "Qwen2MoEDecoderLayer", "Qwen2DecoderLayer, got Qwen2MoEDecoderLayer"),
        ("config.json", "connector_act", "relu", "connector_act gelu_pytorch_tanh .*got relu"),
        ("config.json", "vit_max_num_patch_per_side", 9, "9 to match the tower's table of 5"),
    ]:
        about = json.loads((GOLDEN / file).read_text())
        (copy / file).write_text(json.dumps(about | {key: value}))
        with pytest.raises(ValueError, match=message):
            load(copy)
        shutil.copy(GOLDEN / file, copy / file)
    with pytest.raises(ValueError, match="got another feature_merge, codec.patch, codec.norm_groups; fix: save"):
        convert.export(Bagel(Bagel.tiny()), tmp_path / "out")


def test_rules_work_both_ways() -> None:
    rules = [*expand(Rule(("a.{i}.x", "a.{i}.y"), "b.{i}", (1, 2)), i=range(2)), Rule(("c",), "d", op="negate")]
    theirs = {f"a.{i}.{n}": torch.randn(s, 2) for i in range(2) for n, s in (("x", 1), ("y", 2))}
    theirs["c"] = torch.randn(3)
    shapes = {"b.0": torch.Size((3, 2)), "b.1": torch.Size((3, 2)), "d": torch.Size((3,))}
    ours, report = to_ours(theirs, rules, shapes)
    assert not report and str(report) == "all tensors placed"
    assert torch.equal(ours["d"], -theirs["c"]) and torch.equal(ours["b.1"][1:], theirs["a.1.y"])
    back = to_theirs(ours, rules)
    assert set(back) == set(theirs) and all(torch.equal(back[k], v) for k, v in theirs.items())
    _, report = to_ours(theirs, rules, {**shapes, "e": torch.Size(())})
    assert report.missing == ["(ours) e"]
