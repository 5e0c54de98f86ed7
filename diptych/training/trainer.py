"""The trainer: a recipe, a system and a folder in; a trained system out.

Exactness. With loss terms k of sums S and counts N, a step minimises sum_k w_k S_k / N_k with N_k counted over all its
micro-batches on all processes, so cutting a step up differently changes nothing but the order of additions. The counts
must be known before the first backward pass: a batch may offer them (`batch.counts`, term -> number); one micro-batch
has them after its forward pass; otherwise a forward pass without gradients counts first.

Resuming. Step k draws from a generator seeded by (seed, k, micro-batch), its documents are a function of k, and
nothing else is random; so a checkpoint holds tensors and a few integers and no generator state.
"""
import contextlib
import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diptych import config
from diptych.data.mix import Mixture
from diptych.systems.base import Losses, System
from diptych.systems.io import save_system, system_tensors
from diptych.training import checkpoint, lora, objectives, sampler
from diptych.training.ema import Ema
from diptych.training.feed import Packet, Share, open_stream, packets, sample_documents
from diptych.training.memory import Kept
from diptych.training.optim import AdamW, clip, gradient_norm
from diptych.training.precision import autocast, native_bf16
from diptych.training.progress import Metrics, Progress, event, interruptible, open_sinks
from diptych.training.recipe import Recipe, Stage, check_resume
from diptych.training.setup import build_system, compile_modules
from diptych.training.stages import fixed_names, lr_at, trained_names

log = logging.getLogger("diptych.training")

MAX_ROLLBACKS = 3


@dataclass
class Place:
    """Where a run is. `data` counts the stage's batches consumed: ahead of the step only after a rollback."""

    step: int = 0
    stage: int = 0
    data: int = 0
    rollbacks: int = 0
    skipped: int = 0
    bad: int = 0  # steps skipped in a row just now
    documents: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Trainer:
    """`Trainer(recipe, folder).run()` trains to the end, continuing from the newest checkpoint in the folder.

    `system` replaces the one the recipe names and `streams(recipe, stage)` its data.
    """

    def __init__(self, recipe: Recipe, run: str | Path, *, system: System | None = None,
                 streams: Callable[[Recipe, Stage], Mixture] = open_stream, device: str | torch.device | None = None,
                 mesh: Any = None) -> None:
        self.recipe, self.run_folder, self.streams, self.mesh = recipe, Path(run), streams, mesh
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.kept = Kept() if self.device.type == "cpu" else None
        self.system = (build_system(recipe) if system is None else system).to(self.device)
        if recipe.lora is not None:
            if mesh is not None:
                raise ValueError("expected LoRA to train in one process, got several; fix: start without torchrun")
            lora.attach(self.system, recipe.lora.layers, recipe.lora.rank, recipe.lora.alpha, seed=recipe.seed)
        self.objective = objectives.make(recipe.objective, self.system)
        self.fixed = fixed_names(self.system)
        trained = set().union(*(trained_names(self.system, s, self.fixed) for s in recipe.stages))
        self.share = Share.of(recipe.accumulate)
        if mesh is not None:
            from diptych.training import parallel

            parallel.shard(self.system, mesh, recipe.parallel.wrap)
            self.share = Share.of(recipe.accumulate, mesh.get_rank(), mesh.size())
        self.main = self.share.rank == 0
        self.sample_every = recipe.samples.every if mesh is None else 0
        if recipe.samples.every and mesh is not None and self.main:
            log.warning("no samples while training with several processes")
        if recipe.precision == "bf16" and self.main and not native_bf16(self.device.type):
            log.info("float32 instead of bf16, which this %s does not compute in", self.device.type)
        compile_modules(self.system, recipe.compile)
        self.ema = Ema(self.system, trained, recipe.ema) if recipe.ema else None
        self.place = Place()
        self.stop = False
        self.pending: deque[tuple[int, Tensor, list[str]]] = deque()
        self.optimizer: AdamW | None = None
        self.enter(0)

    # -- stages and data -----------------------------------------------------------------------------------------------

    @property
    def stage(self) -> Stage:
        return self.recipe.stages[self.place.stage]

    def enter(self, index: int) -> None:
        """Begin a stage: its trained parameters, an optimiser that keeps the moments it can, its stream."""
        self.place.stage = index
        names = trained_names(self.system, self.stage, self.fixed)
        for name, parameter in self.system.named_parameters():
            parameter.requires_grad_(name in names)
            parameter.grad = None
        old = self.optimizer.tensors() if self.optimizer is not None else {}
        self.optimizer = AdamW(self.system, names, self.recipe.optimizer, self.stage)
        self.optimizer.carry(old)
        self.parameters = list(self.optimizer.named.values())
        self.stream = self.streams(self.recipe, self.stage)

    def feed(self) -> Generator[Packet, None, None]:
        """The packets from here to the end of the stage."""
        index, start = self.recipe.stage_at(self.place.step)
        left = start + self.recipe.stages[index].steps - self.place.step
        return packets(self.stream, self.system.collate, self.stage.batch, self.share, self.place.data,
                       self.place.data + left, self.recipe.workers)

    # -- one step ------------------------------------------------------------------------------------------------------

    def generator(self, *keys: int) -> torch.Generator:
        """A fresh generator on the device for (seed, keys); also seeds the global one, for modules that use it."""
        text = ",".join(map(str, (self.recipe.seed, *keys)))
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
        torch.manual_seed(seed)
        return torch.Generator(self.device).manual_seed(seed)

    def forward(self, batch: Any, micro: int) -> Losses:
        generator = self.generator(self.place.step, micro, self.place.rollbacks)
        with autocast(self.recipe.precision, self.device):
            losses = self.objective(self.system, batch, generator)
        factors = self.stage.losses
        unknown = set(factors) - set(losses.weights)
        if unknown and self.share.total == 1:
            raise config.unknown_key(sorted(unknown)[0], losses.weights, f"losses of stage {self.stage.name}")
        losses.weights = {k: w * factors.get(k, 1.0) for k, w in losses.weights.items()}
        return losses

    def counts(self, packet: Packet) -> dict[str, Tensor] | None:
        """Counts of the whole step, before any backward pass; None if its only micro-batch will tell."""
        if self.share.total == 1:
            return None
        mine: dict[str, float] = {}
        for batch, micro in zip(packet.batches, packet.indices, strict=True):
            found = self.objective.counts(self.system, batch)
            if found is None:
                with torch.no_grad():
                    found = self.forward(batch.to(self.device), micro).counts
            for k, v in found.items():
                mine[k] = mine.get(k, 0.0) + float(v)
        if self.mesh is not None:
            from diptych.training import parallel

            mine = parallel.sum_named(mine, self.mesh)
        return {k: torch.tensor(v, device=self.device) for k, v in mine.items()}

    def step(self, packet: Packet) -> dict[str, Any]:
        """One optimiser step. Returns what to log, still on the device."""
        assert self.optimizer is not None
        _, start = self.recipe.stage_at(self.place.step)
        lr = lr_at(self.stage, self.place.step - start)
        self.optimizer.set_lr(lr)
        self.optimizer.zero_grad(set_to_none=True)
        counts = self.counts(packet)
        whole = Losses({}, {}, {})
        sums, totals = whole.sums, whole.counts
        for batch, micro in zip(packet.batches, packet.indices, strict=True):
            losses = self.forward(batch.to(self.device), micro)
            total = losses.total(counts)
            if self.mesh is not None:
                from diptych.training import parallel

                # sharded gradients are averaged over processes; these are parts of one sum
                total = parallel.reach_together(self.system, total, self.mesh) * self.share.processes
            total.backward()
            whole.weights |= losses.weights
            for k, v in losses.sums.items():
                sums[k] = sums[k] + v.detach() if k in sums else v.detach()
                totals[k] = totals[k] + losses.counts[k] if k in totals else losses.counts[k]
        norm = gradient_norm(self.parameters)
        bad = ~torch.isfinite(norm + sum(sums.values()))
        if self.mesh is not None:
            from diptych.training import parallel

            bad = parallel.any_of(bad, self.mesh)
        clip(self.parameters, norm, self.recipe.optimizer.clip)
        self.optimizer.step_unless(bad)
        if self.ema is not None:
            self.ema.update(self.place.step)
        objectives.tell(self.objective, whole, self.mesh)
        place = self.place
        place.step, place.data, place.documents = place.step + 1, place.data + 1, place.documents + self.stage.batch
        place.tokens += sum(int(getattr(b, "num_tokens", 0)) for b in packet.batches) * self.share.processes
        self.pending.append((place.step, bad, packet.names))
        if self.kept is not None:
            self.kept.after_step()
        return {"lr": lr, "norm": norm, "sums": sums, "counts": totals}

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> System:
        """Train to the end of the recipe (or until interrupted, after a checkpoint) and return the system.

        A finished run leaves `model/` with the averaged weights, ready to load.
        """
        self.run_folder.mkdir(parents=True, exist_ok=True)
        self.resume()
        recipe = self.recipe
        if self.main:
            config.save(recipe, self.run_folder / "recipe.yaml")
            self.metrics = Metrics(self.run_folder, self.place.step)
            self.sinks = open_sinks(recipe.sinks, self.run_folder, config.to_dict(recipe))
            self.progress = Progress(recipe.steps, self.place.step, self.run_folder.name)
        with interruptible(self.ask_to_stop):
            try:
                while self.place.step < recipe.steps and not self.stop:
                    self._run_stage()
            finally:
                if self.main:
                    for sink in (self.metrics, self.progress, *self.sinks):
                        sink.close()
        if self.place.step >= recipe.steps:
            self.export()
        return self.system

    def _run_stage(self) -> None:
        """Steps until the stage ends, the run is interrupted, or it is rolled back."""
        recipe, place = self.recipe, self.place
        index, _ = recipe.stage_at(place.step)
        if index != place.stage:
            place.data = 0
            self.enter(index)
        clock, documents, tokens = time.perf_counter(), place.documents, place.tokens
        with contextlib.closing(self.feed()) as feed:
            for packet in feed:
                result = self.step(packet)
                if self.main:
                    self.progress.step()
                logged = place.step % recipe.log_every == 0 or place.step == recipe.steps
                due = place.step % recipe.save_every == 0 or place.step == recipe.steps
                if (self.device.type == "cpu" or logged or due) and not self.look_for_bad_steps():
                    return self.roll_back()
                if logged:
                    now = time.perf_counter()
                    seconds, clock = now - clock, now
                    place.seconds += seconds
                    self.log_step(result, seconds, place.documents - documents, place.tokens - tokens)
                    documents, tokens = place.documents, place.tokens
                if self.sample_every and place.step % self.sample_every == 0:
                    self.sample()
                self.stop = self.stop_together()
                # not while steps fail: the way back must lead to weights from before that
                if (due and not place.bad) or place.step == recipe.steps or self.stop:
                    self.save()
                if self.stop:
                    return

    def look_for_bad_steps(self) -> bool:
        """Count the skipped steps since the last look; False if too many came in a row."""
        while self.pending:
            step, bad, names = self.pending.popleft()
            if not bad.item():
                self.place.bad = 0
                continue
            self.place.bad += 1
            self.place.skipped += 1
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            log.warning("step %d skipped: non-finite loss or gradient on %s", step, shown)
            if self.main:
                event(self.run_folder, "skipped", step=step, documents=names)
        return self.place.bad < self.recipe.bad_steps

    def roll_back(self) -> None:
        """Back to the newest checkpoint, with other draws and (within the stage) documents not seen yet."""
        before, folder = self.place, checkpoint.latest(self.run_folder)
        facts = f"{before.bad} steps in a row with a non-finite loss or gradient at step {before.step}"
        if folder is None or before.rollbacks >= MAX_ROLLBACKS:
            why = "no checkpoint to go back to" if folder is None else f"{before.rollbacks} rollbacks already"
            raise FloatingPointError(f"expected finite losses, got {facts} and {why}; fix: lower lr, raise warmup, "
                                     f"or look at the documents named in {self.run_folder / 'events.jsonl'}")
        self.load(folder)
        place = self.place
        place.rollbacks, place.skipped, place.seconds = before.rollbacks + 1, before.skipped, before.seconds
        if place.stage == before.stage:
            place.data = before.data
        self.pending.clear()
        log.warning("%s: back to step %d", facts, place.step)
        if self.main:
            event(self.run_folder, "rolled back", step=before.step, to=place.step)
            self.metrics.close()
            self.metrics = Metrics(self.run_folder, place.step)
            self.progress.rewind(place.step)

    def log_step(self, result: dict[str, Any], seconds: float, documents: int, tokens: int) -> None:
        """One line of metrics.jsonl: losses are means over this step alone, speeds over the steps since the last."""
        names = list(result["sums"])
        values = torch.stack([*result["sums"].values(), *result["counts"].values()]).double().tolist()
        sums, counts = (dict(zip(names, part, strict=True)) for part in (values[:len(names)], values[len(names):]))
        if self.mesh is not None:
            from diptych.training import parallel

            sums, counts = parallel.sum_named(sums, self.mesh), parallel.sum_named(counts, self.mesh)
        if not self.main:
            return
        place = self.place
        losses = {k: s / max(counts[k], 1.0) for k, s in sums.items()}
        line = {"step": place.step, "stage": self.stage.name, "losses": losses, "counts": counts, "lr": result["lr"],
                "grad_norm": float(result["norm"]), "seconds": round(place.seconds, 3), "documents": place.documents,
                "tokens": place.tokens, "skipped": place.skipped, "documents_per_second": documents / seconds,
                "tokens_per_second": tokens / seconds}
        for sink in (self.metrics, *self.sinks):
            sink.write(line)
        self.progress.show(line, losses)

    def sample(self) -> None:
        """Let the recipe's sampler look at the (averaged) system; the training's random draws are not touched."""
        chosen, documents = self.recipe.samples, sample_documents(self.recipe, self.stage)
        averaged = self.ema.swapped() if self.ema is not None else contextlib.nullcontext()
        with averaged, torch.no_grad():
            sampler.find_sampler(chosen.sampler)(self.system, documents, self.place.step, self.run_folder / "samples")

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def tensors(self) -> checkpoint.Tensors:
        assert self.optimizer is not None
        groups = {"model": system_tensors(self.system), "optimizer": self.optimizer.tensors()}
        return groups | ({"ema": self.ema.shadow} if self.ema is not None else {})

    def save(self) -> None:
        state = {"place": asdict(self.place), "recipe": config.to_dict(self.recipe), "stream": self.stream.state_dict(),
                 "objective": self.objective.state(), "torch": torch.__version__}
        if self.main:
            self.metrics.flush()
        if self.mesh is None:
            checkpoint.save(self.run_folder, self.place.step, self.tensors(), state, self.recipe.keep)
        else:
            from diptych.training import parallel

            parallel.save_shards(self.run_folder, self.place.step, self.tensors(), state, self.recipe.keep, self.mesh)

    def resume(self) -> None:
        if self.main:
            checkpoint.clean(self.run_folder)
        folder = checkpoint.latest(self.run_folder)
        if folder is None:
            return
        changed = check_resume(checkpoint.read_state(folder)["recipe"], self.recipe, str(folder))
        self.load(folder)
        log.info("continuing %s at step %d", self.run_folder.name, self.place.step)
        if self.main:
            event(self.run_folder, "resumed", step=self.place.step, changed=changed)

    def load(self, folder: Path) -> None:
        state = checkpoint.read_state(folder)
        self.optimizer = None
        self.place = Place(**state["place"])
        self.enter(self.place.stage)
        self.stream.load_state_dict(state["stream"])
        self.objective.load(state.get("objective", {}))  # older checkpoints have the system's own loss
        checkpoint.load(folder, self.tensors())

    def export(self) -> None:
        """Write the finished system to `model/`: averaged weights if there are any."""
        averaged = self.ema.swapped() if self.ema is not None else contextlib.nullcontext()
        with averaged:
            if self.mesh is not None:
                from diptych.training import parallel

                parallel.export(self.system, self.run_folder / "model", self.mesh)
            else:
                if self.recipe.lora is not None:
                    lora.save(self.system, self.run_folder / "lora")
                    lora.merge(self.system)
                save_system(self.system, self.run_folder / "model")
        if self.main:
            event(self.run_folder, "finished", step=self.place.step)

    # -- interruption --------------------------------------------------------------------------------------------------

    def ask_to_stop(self) -> None:
        """Finish the step, save, and return from `run`."""
        self.stop = True

    def stop_together(self) -> bool:
        """Whether to stop after this step; processes of one run must agree."""
        if self.mesh is None:
            return self.stop
        from diptych.training import parallel

        return bool(parallel.any_of(torch.tensor(self.stop, device=self.device), self.mesh))
