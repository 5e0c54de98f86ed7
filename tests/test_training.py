import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import training_system as small
from PIL import Image as Pil

from diptych.config import ConfigError
from diptych.data.mix import Mixture
from diptych.document import Document, Image, Text
from diptych.systems.base import Losses
from diptych.systems.io import load_system, save_system
from diptych.training import precision, sampler
from diptych.training.ema import Ema
from diptych.training.progress import Metrics, read_lines
from diptych.training.recipe import Optimizer, Stage
from diptych.training.trainer import Trainer


def trainer(run: Path, system: small.TinyText | None = None, **changes) -> Trainer:
    return Trainer(small.recipe(**changes), run, system=system or small.build(), streams=small.words, device="cpu")


def losses(run: Path) -> list[dict]:
    return [line["losses"] for line in read_lines(run / "metrics.jsonl")]


def test_frozen_parameters_stay_and_the_others_move(tmp_path: Path) -> None:
    system = small.build()
    before = {n: p.detach().clone() for n, p in system.named_parameters()}
    stages = (Stage(name="a", steps=3, batch=4, lr=1e-2, only=("probe",)),
              Stage(name="b", steps=3, batch=4, lr=1e-2, freeze=("probe", "embed")))
    after_a = {}

    class Watch(Trainer):
        def enter(self, index: int) -> None:
            if index == 1:
                after_a.update({n: p.detach().clone() for n, p in self.system.named_parameters()})
            super().enter(index)

    Watch(small.recipe(stages=stages, ema=0.0), tmp_path, system=system, streams=small.words, device="cpu").run()
    for name, p in system.named_parameters():
        moved_a, moved_b = not torch.equal(before[name], after_a[name]), not torch.equal(after_a[name], p)
        assert (moved_a, moved_b) == (name.startswith("probe"), not name.startswith(("probe", "embed"))), name


def test_parameters_built_frozen_stay_so(tmp_path: Path) -> None:
    system = small.build()
    system.probe.requires_grad_(False)
    before = system.probe.weight.detach().clone()
    trainer(tmp_path / "a", system, stages=(Stage(steps=2, batch=4, lr=1e-2),)).run()
    assert torch.equal(system.probe.weight, before) and not system.probe.weight.requires_grad
    with pytest.raises(ValueError, match="fixed"):
        trainer(tmp_path / "b", system, stages=(Stage(steps=2, batch=4, lr=1e-2, only=("probe", "norm")),))


# -- exact steps ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("declare", [True, False])
def test_accumulation_equals_one_batch(tmp_path: Path, declare: bool) -> None:
    """The text term has no noise: cutting the step up must not change its loss, and its counts not at all."""
    stage = Stage(steps=6, batch=8, lr=1e-2, losses={"noise": 0.0})
    for name, parts in (("one", 1), ("four", 4)):
        trainer(tmp_path / name, small.build(declare_counts=declare), stages=(stage,), accumulate=parts).run()
    one, four = losses(tmp_path / "one"), losses(tmp_path / "four")
    assert [a["text"] for a in four] == pytest.approx([a["text"] for a in one], abs=2e-5)
    counts = [[line["counts"] for line in read_lines(tmp_path / n / "metrics.jsonl")] for n in ("one", "four")]
    assert counts[0] == counts[1]


def test_declared_counts_equal_counted_ones(tmp_path: Path) -> None:
    for name, declare in (("told", True), ("counted", False)):
        trainer(tmp_path / name, small.build(declare_counts=declare), accumulate=2).run()
    assert losses(tmp_path / "told") == losses(tmp_path / "counted")


def test_random_draws_depend_on_seed_and_step_only(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    draws = [torch.rand(2, generator=t.generator(k, 0)).tolist() for k in (1, 2, 1)]
    assert draws[0] == draws[2] != draws[1]
    other = trainer(tmp_path, seed=1)
    assert torch.rand(2, generator=other.generator(1, 0)).tolist() != draws[0]


def test_loss_factors_scale_their_term(tmp_path: Path) -> None:
    system = small.build()
    stage = Stage(steps=2, batch=4, lr=1e-2, losses={"noise": 0.0})
    before = system.probe.weight.detach().clone()
    trainer(tmp_path / "a", system, stages=(stage,), ema=0.0, optimizer=Optimizer(weight_decay=0.0)).run()
    assert torch.equal(system.probe.weight, before)  # only the noise term reaches the probe
    with pytest.raises(ConfigError, match="'noise'"):
        trainer(tmp_path / "b", stages=(dataclasses.replace(stage, losses={"noize": 1.0}),)).run()


def test_training_learns_and_exports_the_average(tmp_path: Path) -> None:
    t = trainer(tmp_path / "run", small.build(), stages=(Stage(steps=60, batch=8, lr=2e-2, warmup=3),), log_every=5)
    system = t.run()
    text = [v["text"] for v in losses(tmp_path / "run")]
    assert text[-1] < 0.5 * text[0]
    exported = load_system(tmp_path / "run" / "model", cls=small.TinyText)
    assert t.ema is not None
    assert torch.equal(exported.probe.weight, t.ema.shadow["probe.weight"])
    assert not torch.equal(exported.probe.weight, system.probe.weight)
    assert exported.head.weight is exported.embed.weight
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(5, 61, 5))
    assert lines[-1]["documents"] == 480 and lines[-1]["tokens"] > 0 and lines[-1]["skipped"] == 0


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bf16_autocast_is_used_where_it_is_no_emulation(native: bool, expected: torch.dtype, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "native_bf16", lambda kind: native)
    seen = []

    class Spy(small.TinyText):
        def loss(self, batch: small.Batch, generator: torch.Generator) -> Losses:
            seen.append(self.probe(self.norm(self.embed(batch.ids))).dtype)
            return super().loss(batch, generator)

    torch.manual_seed(0)
    trainer(tmp_path, Spy(Spy.Config()), precision="bf16", stages=(Stage(steps=2, batch=4, lr=1e-2),)).run()
    assert set(seen) == {expected}


def test_a_cpu_says_whether_it_computes_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, native in (({"avx512_f": True, "avx512_bf16": False}, False), ({"amx_bf16": True}, True), ({}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags)
        precision.native_bf16.cache_clear()
        assert precision.native_bf16("cpu") == native
    precision.native_bf16.cache_clear()


# -- steps that go wrong ----------------------------------------------------------------------------------------------

class Fragile(small.TinyText):
    """Its loss is not finite on the given calls."""

    bad: frozenset[int] = frozenset()
    calls = 0

    def loss(self, batch: small.Batch, generator: torch.Generator) -> Losses:
        result = super().loss(batch, generator)
        if self.calls in self.bad:
            result.sums["text"] = result.sums["text"] * float("nan")
        self.calls += 1
        return result


def fragile(*bad: int) -> Fragile:
    torch.manual_seed(0)
    system = Fragile(Fragile.Config())
    system.bad = frozenset(bad)
    return system


def test_a_bad_step_is_skipped_counted_and_named(tmp_path: Path, caplog) -> None:
    system = fragile(2)
    t = trainer(tmp_path, system, stages=(Stage(steps=4, batch=3, lr=1e-2),))
    seen: list[torch.Tensor] = []
    step = t.step
    t.step = lambda packet: (seen.append(system.probe.weight.detach().clone()), step(packet))[1]  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING, "diptych.training"):
        t.run()
    assert torch.equal(seen[2], seen[3]) and not torch.equal(seen[1], seen[2])
    assert all(bool(torch.isfinite(p).all()) for p in system.parameters())
    skipped = [e for e in read_lines(tmp_path / "events.jsonl") if e["event"] == "skipped"]
    wanted = [f"words/{t.stream.document(p).meta['index']}" for p in (6, 7, 8)]
    assert [e["documents"] for e in skipped] == [wanted] and "words/" in caplog.text
    assert read_lines(tmp_path / "metrics.jsonl")[-1]["skipped"] == 1


def test_repeated_bad_steps_roll_back_and_go_on_with_new_documents(tmp_path: Path) -> None:
    t = trainer(tmp_path, fragile(6, 7, 8), stages=(Stage(steps=12, batch=3, lr=1e-2),), bad_steps=3, save_every=4)
    t.run()
    events = {e["event"]: e for e in read_lines(tmp_path / "events.jsonl")}
    assert events["rolled back"]["to"] == 4 and events["rolled back"]["step"] == 9
    assert t.place.rollbacks == 1 and t.place.data == 12 + 5  # five batches were spent on the lost steps
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all(np.isfinite(line["losses"]["text"]) for line in lines)


def test_bad_from_the_start_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="no checkpoint to go back to"):
        trainer(tmp_path, fragile(*range(50)), bad_steps=3).run()


# -- data -------------------------------------------------------------------------------------------------------------

def test_batch_must_be_cut_evenly(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="multiple of the 3"):
        trainer(tmp_path, accumulate=3).run()


# -- the rest ---------------------------------------------------------------------------------------------------------

def test_ema_follows_in_float32_and_swaps() -> None:
    module = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    ema = Ema(module, ["weight"], 0.5)
    start = module.weight.detach().float().clone()
    with torch.no_grad():
        module.weight.add_(1.0)
    ema.update(step=100)
    expected = 0.5 * start + 0.5 * module.weight.detach().float()
    assert ema.shadow["weight"].dtype == torch.float32
    torch.testing.assert_close(ema.shadow["weight"], expected)
    kept = module.weight.detach().clone()
    with ema.swapped():
        torch.testing.assert_close(module.weight.detach(), expected.bfloat16())
    assert torch.equal(module.weight, kept)


def test_ema_may_skip_steps() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    ema, seen = Ema(module, ["weight"], 0.9, interval=3), []
    for step in range(6):
        with torch.no_grad():
            module.weight.fill_(step)
        ema.update(step)
        seen.append(float(ema.shadow["weight"]))
    assert seen[2] != seen[0] == seen[1] and seen[3] == seen[4] == seen[2] != seen[5]
    decay = 6 / 15  # (1 + k) / (10 + k) at k = 5
    assert seen[5] == pytest.approx(decay * seen[2] + (1 - decay) * 5)
    with pytest.raises(ValueError, match="an interval >= 1, got 0.9 and 0"):
        Ema(module, ["weight"], 0.9, interval=0)


def test_metrics_forget_lost_steps_and_torn_lines(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    metrics = Metrics(tmp_path, step=2)
    metrics.write({"step": 3, "again": True})
    metrics.close()
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_progress_lines_without_a_terminal(tmp_path: Path, caplog) -> None:
    with caplog.at_level(logging.INFO, "diptych.training"):
        trainer(tmp_path / "run", stages=(Stage(steps=4, batch=4, lr=1e-2),), log_every=2).run()
    lines = [m for m in caplog.messages if m.startswith("run ")]
    assert len(lines) == 2 and "run 4/4 main | text" in lines[1] and "docs/s" in lines[1] and "left 0:00:00" in lines[1]


def test_grid_of_samples(tmp_path: Path) -> None:
    picture = Image(pixels=np.zeros((3, 8, 8)), role="assistant", target=True)
    caption = Text(text="a dot", role="assistant", target=True)
    documents = [Document((Text(text="draw it"), picture), "draw"),
                 Document((Image(pixels=np.ones((3, 8, 8))), caption), "caption")]

    class Echo(small.TinyText):
        def generate(self, documents, recipe=None, **kwargs) -> list[Document]:
            assert all(p.empty for d in documents for p in d.targets)
            return [Document(tuple(p.replace(**({"pixels": np.ones((3, 8, 8))} if isinstance(p, Image) else
                                                {"text": "made"})) if p.target else p for p in d), d.task)
                    for d in documents]

    sampler.grid(Echo(Echo.Config()), documents, 7, tmp_path)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-000007.json", "step-000007.png"]
    with Pil.open(tmp_path / "step-000007.png") as sheet:
        assert sheet.size == (3 * 134 + 6, 2 * 134 + 6)
        assert sheet.getpixel((134 + 70, 70)) == (255, 255, 255)
        assert sheet.getpixel((2 * 134 + 70, 70)) == (128, 128, 128)
    assert json.loads((tmp_path / "step-000007.json").read_text())[1] == {"task": "caption", "made": ["made"],
                                                                         "wanted": ["a dot"]}
    with pytest.raises(ValueError, match="module:function"):
        sampler.find_sampler("diptych.training.sampler:nothing")


def test_saved_system_is_bit_equal_and_refuses_other_tensors(tmp_path: Path) -> None:
    system = small.build(3)
    save_system(system, tmp_path)
    again = load_system(tmp_path, cls=small.TinyText)
    assert again.config == system.config
    state = again.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in system.state_dict().items())
    about = json.loads((tmp_path / "config.json").read_text())
    about["config"]["layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"6 missing \(blocks\.2"):
        load_system(tmp_path, cls=small.TinyText)
    about["config"]["layer"] = 3
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(ConfigError, match=r"config\.json.*'layers'"):
        load_system(tmp_path, cls=small.TinyText)


def test_mixture_states_guard_the_order(tmp_path: Path) -> None:
    t = trainer(tmp_path / "run", stages=(Stage(steps=4, batch=4, lr=1e-2),), save_every=2)
    t.run()
    other = Trainer(small.recipe(stages=(Stage(steps=4, batch=4, lr=1e-2),), save_every=2), tmp_path / "run",
                    system=small.build(), device="cpu", streams=lambda r, s: Mixture([(small.Words(), 2.0)], seed=9))
    with pytest.raises(ValueError, match="data state"):
        other.run()
