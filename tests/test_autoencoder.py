import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pil

from diptych import config
from diptych.document import Document, Image, Text
from diptych.parts.resources import stored_config
from diptych.parts.vae import AutoEncoderConfig
from diptych.systems.autoencoder import Autoencoder, AutoencoderConfig, sheet
from diptych.systems.bagel import Bagel
from diptych.systems.io import load_system, save_system
from diptych.training.optim import AdamW, inner_matrices
from diptych.training.recipe import Optimizer, Recipe, Source, Stage
from diptych.training.setup import build_system, system_config
from diptych.training.stages import trained_names
from diptych.training.trainer import Trainer

PLAIN = {"symmetries": False, "tint": 0.0}


def documents(count: int, size: tuple[int, int] = (16, 16), seed: int = 0) -> list[Document]:
    """Smooth coloured gradients."""
    rng = np.random.default_rng(seed)
    y, x = np.linspace(-1, 1, size[0])[:, None], np.linspace(-1, 1, size[1])[None]
    out = []
    for a, b, c in rng.uniform(-0.5, 0.5, (count, 3, 3, 1, 1)):
        picture = Image(pixels=(a + b * y + c * x).clip(-1, 1).astype(np.float32), target=True)
        out.append(Document((Text(text="a gradient"), picture), "draw", {}))
    return out


def build(seed: int = 0, **changes) -> Autoencoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Autoencoder(dataclasses.replace(Autoencoder.tiny(), **changes))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def save_trained(folder: Path, channels: int = 5) -> Autoencoder:
    """A saved codec with measured statistics."""
    system = build(codec=dataclasses.replace(Autoencoder.tiny().codec, latent_channels=channels), **PLAIN)
    system.loss(system.collate(documents(6)), generator())
    save_system(system, folder)
    return system


# -- batches and the loss ---------------------------------------------------------------------------------------------

def test_batches_hold_every_picture_and_count_every_term() -> None:
    system = build()
    two = Document((documents(1)[0].pieces[1], documents(1, (8, 32))[0].pieces[1]), "edit", {})
    batch = system.collate([*documents(3), two])
    assert sorted(tuple(g.shape) for g in batch.groups) == [(1, 3, 8, 32), (4, 3, 16, 16)]
    pixels = 4 * 3 * 256 + 3 * 256
    edges = 4 * 3 * 2 * 15 * 16 + 3 * (7 * 32 + 8 * 31)
    assert batch.num_tokens == 4 * 4 + 1 * 4
    assert batch.counts == {"l1": pixels, "mse": pixels, "edge": edges, "kl": batch.num_tokens * 6}
    losses = system.loss(batch, generator())
    assert {k: float(v) for k, v in losses.counts.items()} == batch.counts and set(losses.weights) == set(batch.counts)
    with pytest.raises(ValueError, match=r"multiples of 8, got 12 x 16; fix: give the data source a size"):
        system.collate(documents(1, (12, 16)))
    with pytest.raises(ValueError, match="expected a picture in every document"):
        system.collate([Document((Text(text="words", target=True),), "chat", {})])


def test_every_term_is_the_mean_it_says() -> None:
    system = build(**PLAIN, logvar=-60.0)  # no posterior noise
    images = system.collate(documents(4)).groups[0]
    with torch.no_grad():
        mean = system.loss(system.collate(documents(4)), generator()).mean()
    error = (system.codec.decode(system.codec.encode(images).mean) - images).detach()
    assert float(mean["l1"]) == pytest.approx(float(error.abs().mean()), rel=1e-4)
    assert float(mean["mse"]) == pytest.approx(float(error.square().mean()), rel=1e-4)
    across, down = error[..., 1:] - error[..., :-1], error[..., 1:, :] - error[..., :-1, :]
    steps = torch.cat([across.flatten(), down.flatten()])
    assert float(mean["edge"]) == pytest.approx(float(steps.abs().mean()), rel=1e-4)
    assert float(mean["kl"]) == pytest.approx(float(system.codec.encode(images).kl().mean().detach()), rel=1e-4)


def test_overfits_one_batch() -> None:
    system = build(**PLAIN)
    batch = system.collate(documents(8))
    stage = Stage(steps=60, batch=8, lr=1e-2)
    optimizer = AdamW(system, trained_names(system, stage), Optimizer(kind="muon", weight_decay=0.0), stage)
    history = []
    for step in range(60):
        losses = system.loss(batch, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        losses.total().backward()
        optimizer.step_unless(torch.tensor(False))
        history.append(float(losses.mean()["l1"].detach()))
    assert history[-1] < 0.25 * history[0], history[::10]


def test_muon_takes_the_kernels_between_hidden_states() -> None:
    names = inner_matrices(build())
    assert "codec.encoder.mid.block_1.conv1.weight" in names and "codec.decoder.mid.attn_1.q.weight" in names
    assert not {n for n in names if "conv_in" in n or "conv_out" in n}


def test_pictures_are_varied_by_the_generator_alone() -> None:
    system = build(tint=0.5)
    images = system.collate(documents(4)).groups[0]
    (a, tinted), (b, _) = system.varied(images, generator()), system.varied(images, generator())
    assert tinted == 2 and torch.equal(a, b) and not torch.equal(a[:2], images[:2])
    turned = [system.varied(images, torch.Generator().manual_seed(s))[0][2:] for s in range(12)]
    assert len({tuple(t.flatten().tolist()) for t in turned}) > 3, "several symmetries of the square"
    for t in turned:
        assert torch.equal(t.flatten(2).sort(-1).values, images[2:].flatten(2).sort(-1).values), "only places change"


# -- statistics of latents --------------------------------------------------------------------------------------------

def test_a_saved_codec_has_latents_of_zero_mean_and_unit_variance(tmp_path: Path) -> None:
    system = build(**PLAIN)
    assert system.config == dataclasses.replace(Autoencoder.tiny(), **PLAIN), "as built until something is measured"
    groups = [documents(6, seed=s) for s in range(3)]
    for group in groups:
        system.loss(system.collate(group), generator())
    images = torch.cat([system.collate(g).groups[0] for g in groups])
    save_system(system, tmp_path)
    loaded = load_system(tmp_path)  # by its name among the tools
    assert isinstance(loaded, Autoencoder) and loaded.config == system.config
    with torch.no_grad():
        latents = loaded.codec.latent(images).transpose(0, 1).flatten(1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(6), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std(1, correction=0), torch.ones(6), atol=1e-2, rtol=0)
    torch.testing.assert_close(loaded.reconstruct(images), system.reconstruct(images), atol=1e-4, rtol=0)
    for name, tensor in system.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_statistics_follow_training_steps_only() -> None:
    system = build(**PLAIN, memory=4)
    batch = system.collate(documents(4))
    with torch.no_grad():
        system.loss(batch, generator())
    assert float(system.latent_batches) == 0
    system.loss(batch, generator())
    before = system.config
    broken = dataclasses.replace(batch, groups=[batch.groups[0] * torch.nan])
    system.loss(broken, generator())
    assert system.config == before and float(system.latent_batches) == 1, "a step that is skipped leaves no trace"
    other = system.collate(documents(4, seed=9))
    for _ in range(40):  # with a short memory the old batch is forgotten
        system.loss(other, generator())
    fresh = build(**PLAIN)
    fresh.loss(other, generator())
    assert system.config.codec.shift == pytest.approx(fresh.config.codec.shift, abs=1e-4)


def test_sizes_on_the_meta_device() -> None:
    with torch.device("meta"):
        small, paper = Autoencoder(Autoencoder.small()), Autoencoder(Autoencoder.paper())
    assert small.num_parameters() == 1_211_068 and paper.num_parameters() == 83_819_683
    assert paper.config.codec == AutoEncoderConfig.paper()


# -- with the trainer -------------------------------------------------------------------------------------------------

@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, document in enumerate(documents(6)):
        Pil.fromarray(document.of(Image)[0].to_uint8()).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"gradient {i}")
    return folder


def recipe(folder: Path, **changes) -> Recipe:
    facts = {"system": "autoencoder", "data": (Source(folder=str(folder), task="draw"),), "ema": 0.9, "workers": 0,
             "stages": (Stage(steps=4, batch=4, lr=1e-3),), "save_every": 2, "log_every": 1}
    return Recipe(**{**facts, **changes})


def test_an_interrupted_training_ends_with_the_same_statistics(pictures: Path, tmp_path: Path) -> None:
    whole = Trainer(recipe(pictures, accumulate=2), tmp_path / "whole", device="cpu").run()
    first = Trainer(recipe(pictures, accumulate=2), tmp_path / "cut", device="cpu")
    first.stop_together = lambda: first.place.step >= 2  # type: ignore[method-assign]
    first.run()
    again = Trainer(recipe(pictures, accumulate=2), tmp_path / "cut", device="cpu").run()
    assert float(whole.latent_batches) == 8, "two micro-batches of four steps, none counted twice"
    assert again.config == whole.config
    for run in ("cut", "whole"):
        assert load_system(tmp_path / run / "model").config == whole.config


def test_sheet_shows_pictures_above_their_reconstructions(tmp_path: Path) -> None:
    system = build()
    sheet(system, documents(3), 7, tmp_path)
    drawn = np.asarray(Pil.open(tmp_path / "step-000007.png"))
    assert drawn.shape == (32, 48, 3) and [p.name for p in tmp_path.iterdir()] == ["step-000007.png"]
    assert np.array_equal(drawn[:16, 16:32], documents(3)[1].of(Image)[0].to_uint8())
    with pytest.raises(TypeError, match="expected a system that reconstructs pictures, got Bagel"):
        sheet(Bagel(Bagel.tiny()), documents(1), 0, tmp_path)


# -- initial weights bring their config -------------------------------------------------------------------------------

def bagel(source: str, **changes) -> Recipe:
    stage = Stage(steps=1, batch=1, lr=1.0)
    return Recipe(system="bagel", size="tiny", init={"codec": source}, stages=(stage,), **changes)


def test_initial_weights_bring_sizes_and_statistics_along(tmp_path: Path) -> None:
    trained = save_trained(tmp_path)
    codec = trained.config.codec
    assert codec.latent_channels == 5 and codec != Bagel.tiny().codec and isinstance(codec.shift, tuple)
    system = build_system(bagel(f"{tmp_path}#codec"))
    assert isinstance(system, Bagel) and system.config.codec == codec and system.token_width == 5 * 4
    images = trained.collate(documents(4)).groups[0]
    loaded = load_system(tmp_path)
    assert isinstance(loaded, Autoencoder)
    with torch.no_grad():
        assert torch.equal(system.codec.latent(images), loaded.codec.latent(images))
    assert dataclasses.replace(system.config, codec=Bagel.tiny().codec) == Bagel.tiny(), "and nothing else"


def test_the_recipe_has_the_last_word(tmp_path: Path) -> None:
    save_trained(tmp_path)
    _, c = system_config(bagel(f"{tmp_path}#codec", config={"codec.shift": 0.25, "row": 64}))
    assert (c.codec.shift, c.codec.latent_channels, c.row) == (0.25, 5, 64)
    other = {"codec.latent_channels": 6, "codec.shift": 0.0, "codec.scale": 1.0}
    with pytest.raises(ValueError, match="another shape"):
        build_system(bagel(f"{tmp_path}#codec", config=other))


def test_where_a_source_states_its_config(tmp_path: Path) -> None:
    _, shipped = system_config(bagel("zoo/codec"))
    assert shipped.codec == AutoEncoderConfig(**stored_config("zoo/codec"))
    save_trained(tmp_path)
    (tmp_path / "config.json").unlink()
    _, kept = system_config(bagel(f"{tmp_path}#codec"))
    assert kept == Bagel.tiny()
    with pytest.raises(FileNotFoundError, match="fix: train or build them first"):
        system_config(bagel(str(tmp_path / "none")))
    save_trained(tmp_path)
    with pytest.raises(ValueError, match="for codec"):
        system_config(bagel(str(tmp_path)))  # the whole system instead of its codec


def test_config_type_round_trips() -> None:
    for c in (Autoencoder.tiny(), Autoencoder.small(), Autoencoder.paper()):
        assert config.from_dict(AutoencoderConfig, config.to_dict(c)) == c
