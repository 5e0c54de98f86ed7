"""The golden cases of UniGame on Janus: the perturber, one turn of each side with LoRA on the language model, drawing
with and without perturbed codes, mining, and the buffer.

Published rows are padded on both sides and positions count the padding; here padding is left out and positions go on
from where it ends.
"""
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from diptych.adapters.cases import Case
from diptych.adapters.janus_cases import contexts, drive, written
from diptych.adapters.janus_language import load_language
from diptych.adapters.keys import Rule
from diptych.alignment import adversary
from diptych.alignment.adversary import Game, HardBuffer, Mining, Perturber
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_token import TokenSampling, guide, log_probs
from diptych.parts.interleave import IGNORE, Page, Writer
from diptych.systems.base import Sampling
from diptych.systems.batch import Batch
from diptych.systems.janus import Janus
from diptych.training import lora

EXACT, TOLERANCE, GRADIENT = 1e-5, 2e-4, 1e-3
PEFT = "base_model.model."


def parity(folder: Path) -> list[Case]:
    """Every case of a golden folder."""
    about = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    golden = load_file(folder / "golden.safetensors")
    known = {"game": _game, "generate": _generate, "mining": _mining, "buffer": _buffer, "perturb": _perturb}
    foreign = sorted(set(about) - set(known))
    if foreign:
        raise ValueError(f"expected golden cases out of {', '.join(known)}, got {foreign[0]!r}")
    cases: list[Case] = []
    for name, run in known.items():
        if name in about:
            own = {k.removeprefix(f"{name}."): v for k, v in golden.items() if k.startswith(f"{name}.")}
            cases += run(folder, about, own)
    return cases


def _relative(name: str, own: Tensor, golden: Tensor) -> Case:
    scale = golden.abs().max().clamp_min(1e-12)
    return Case.compare(name, own / scale, golden / scale, GRADIENT)


def _given(golden: Mapping[str, Tensor], side: str = "input") -> dict[str, Tensor]:
    return {k.removeprefix(f"{side}."): v for k, v in golden.items() if k.startswith(f"{side}.")}


# -- the perturber ----------------------------------------------------------------------------------------------------

def _perturber(folder: Path, about: Mapping[str, Any]) -> Perturber:
    c = about["perturb"]
    made = Perturber(c["in_dim"], hidden=c["width"], eps_max=c["eps_max"], eps_min=c["min_eps"],
                     eps_start=c["eps_init"])
    theirs = {k.partition(".")[2]: v for k, v in load_file(folder / "perturb.safetensors").items()}
    made.load_state_dict({"rho" if k == "log_eps" else k: v for k, v in theirs.items()})
    return made


def _perturbed_grads(made: Perturber, loss: Tensor) -> dict[str, Tensor]:
    names = [n for n, _ in made.named_parameters()]
    found = torch.autograd.grad(loss, list(made.parameters()))
    return {"log_eps" if n == "rho" else n: g for n, g in zip(names, found, strict=True)}


def _perturb(folder: Path, about: Mapping[str, Any], golden: Mapping[str, Tensor]) -> list[Case]:
    made, given, wanted = _perturber(folder, about), _given(golden), _given(golden, "output")
    delta = made(given["z"])
    own = {"delta": delta.detach(), "eps": made.eps.detach()}
    grads = _perturbed_grads(made, (delta * given["cotangent"]).sum())
    cases = [Case.compare(f"perturb.{k}", v, wanted[k], EXACT) for k, v in own.items() if k in wanted]
    return cases + [_relative(f"perturb.{k}", grads[k.removeprefix("grad.")], v) for k, v in wanted.items()
                    if k.startswith("grad.")]


# -- the model with its adapter ---------------------------------------------------------------------------------------

def _model(folder: Path, about: Mapping[str, Any], pad: int, image_start: int = 0) -> tuple[Janus, list[Rule]]:
    """`image_start`: the id that precedes a drawing, if one is drawn."""
    ids = {"bos": pad, "eos": pad, "pad": pad, "image_start": image_start, "image_end": pad}
    model, rules = load_language(folder, ids, side=4)
    _adapt(model, rules, folder, about["perturb"]["lora"])
    return model, rules


def _adapted(rules: Sequence[Rule]) -> dict[str, tuple[str, int]]:
    """Published linear layer -> ours, and its place among those that ours joins."""
    found = {}
    for rule in rules:
        for place, theirs in enumerate(rule.theirs):
            found[theirs.removesuffix(".weight")] = rule.ours.removesuffix(".weight"), place
    return found


def _adapt(model: Janus, rules: Sequence[Rule], folder: Path, about: Mapping[str, Any]) -> None:
    """LoRA of published layers on ours: where ours joins n of them, rank n r, each with rows and columns of its own."""
    tensors = {k.removeprefix(PEFT): v for k, v in load_file(folder / "adapter_model.safetensors").items()}
    homes, sizes = _adapted(rules), {r.ours.removesuffix(".weight"): r.sizes for r in rules}
    layers: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            ours, place = homes[f"language_model.{name}"]
            layers.setdefault(ours, {})[place] = tensors[key], tensors[f"{name}.lora_B.weight"]
    rank, scale = about["r"], about["alpha"] / about["r"]
    for name, parts in layers.items():
        count = max(len(sizes[name]), 1)
        lora.attach(model, [name], rank * count, scale * rank * count)
        layer = lora.layers(model)[name]
        outs = [*sizes[name]] or [layer.lora_B.weight.shape[0]]
        blocks = [parts.get(n, (torch.zeros(rank, layer.lora_A.in_features), torch.zeros(outs[n], rank)))
                  for n in range(count)]
        with torch.no_grad():
            layer.lora_A.weight.copy_(torch.cat([a for a, _ in blocks]))
            layer.lora_B.weight.copy_(torch.block_diag(*[b for _, b in blocks]))
    for layer in lora.layers(model).values():
        layer.requires_grad_(True)
        layer.base.requires_grad_(False)


def _adapter_grad(model: Janus, rules: Sequence[Rule], name: str, grads: Mapping[str, Tensor], rank: int) -> Tensor:
    """Of a published adapter matrix: its rows of A, or its block of B."""
    layer, _, matrix = name.removesuffix(".weight").rpartition(".")
    ours, place = _adapted(rules)[f"language_model.{layer}"]
    sizes = next(r.sizes for r in rules if r.ours == f"{ours}.weight")
    found, own = grads[f"{ours}.{matrix}.weight"], slice(place * rank, (place + 1) * rank)
    if matrix == "lora_A":
        return found[own]
    start = sum(sizes[:place])
    return found[start:start + sizes[place], own] if sizes else found


# -- the game ---------------------------------------------------------------------------------------------------------

def _game(folder: Path, about: Mapping[str, Any], golden: Mapping[str, Tensor]) -> list[Case]:
    c, rank = about["game"], about["perturb"]["lora"]["r"]
    pixels = golden["input.pixel_values"]
    count = golden["output.image_features"].shape[1]
    model, rules = _model(folder, about, c["pad_id"])
    game = Game(strength=c["lambda_"], l2=c["w_l2"], tv=c["w_tv"], radius=c["w_eps"], clean=c["d_clean_weight"])
    rows, labels = _rows(model, c, count)
    page = Page.of([[w] for w in rows])
    page.labels[:] = labels
    batch = Batch(page, [], list(pixels), [], [])
    features = golden["output.image_features"]
    cases = [Case.compare("game.image_features", model.see(batch.views).view_as(features).detach(), features,
                          TOLERANCE)]
    generator = torch.Generator()
    clean = adversary.clean_turn(model, batch, generator, game)
    cases.append(Case.compare("game.clean.ce", clean.ce.detach(), golden["clean.output.ce"], TOLERANCE))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = dict(zip(trained, torch.autograd.grad(clean.loss, list(trained.values())), strict=True))
    cases += [_relative(f"game.clean.{k}", _adapter_grad(model, rules, k.removeprefix("grad."), grads, rank), v)
              for k, v in _given(golden, "clean.output").items() if k.startswith("grad.")]
    made = _perturber(folder, about)
    play = adversary.adversary_turn(model, batch, made, generator, game)
    assert play.cost is not None
    own = {"ce": play.ce, "generator_loss": play.loss, "reg": play.cost.total, "reg_l2": play.cost.l2,
           "reg_tv": play.cost.tv, "reg_eps": play.cost.radius}
    moved = _perturbed_grads(made, play.loss)
    wanted = _given(golden, "adversary.output")
    # lambda times the cross-entropy: its error is that of the cross-entropy
    scale = {"generator_loss": max(c["lambda_"], 1.0)}
    cases += [Case.compare(f"game.adversary.{k}", v.detach() / scale.get(k, 1.0), wanted[k] / scale.get(k, 1.0),
                           TOLERANCE) for k, v in own.items() if k in wanted]
    return cases + [_relative(f"game.adversary.{k}", moved[k.removeprefix("grad.")], v) for k, v in wanted.items()
                    if k.startswith("grad.")]


def _rows(model: Janus, c: Mapping[str, Any], count: int) -> tuple[list[Writer], Tensor]:
    """Prompts with features in place of their picture, answers behind them, from where the padding ends; and the labels
    of what each token predicts."""
    longest = max(len(p) for p in c["prompts"]) + count - 1
    rows, targets = [], []
    for prompt, answer in zip(c["prompts"], c["answers"], strict=True):
        at = prompt.index(c["image_token"])
        ids = torch.tensor([*prompt[:at], *[c["image_token"]] * count, *prompt[at + 1:], *answer])
        start = len(prompt) + count - 1
        rows.append(written(model, ids, (torch.arange(len(ids)) >= at) & (torch.arange(len(ids)) < at + count), count,
                            longest - start))
        targets.append((start, answer))
    labels = torch.full((len(rows), max(w.strip.length for w in rows)), IGNORE)
    for b, (start, answer) in enumerate(targets):
        labels[b, start - 1:start - 1 + len(answer)] = torch.tensor(answer)
    return rows, labels


def _generate(folder: Path, about: Mapping[str, Any], golden: Mapping[str, Tensor]) -> list[Case]:
    c, given = about["generate"], _given(golden)
    uniforms = given["uniforms"].T.double()  # (row, step)
    model, _ = _model(folder, about, c["pad_id"], int(given["prompt_ids"][0, -1]))
    made = _perturber(folder, about)
    chain = Guidance(branches=(Branch(context="no_text", scale=c["cfg_weight"]),))
    sampling = Sampling(guidance=chain, codes=TokenSampling(temperature=c["temperature"]))
    cases: list[Case] = []
    for name in ("clean", "perturbed"):
        wanted = _given(golden, f"{name}.output")
        if not wanted:
            continue
        with torch.no_grad():
            if name == "perturbed":
                with adversary.perturbed(model, made):
                    drawn, heard = _drawn(model, given["prompt_ids"], uniforms, sampling)
            else:
                drawn, heard = _drawn(model, given["prompt_ids"], uniforms, sampling)
        guided = [[guide({"full": a[0], "no_text": a[1]}, chain, 0.0) for a in log] for log in heard]
        probs = torch.stack([log_probs(torch.cat(row), sampling.codes).exp() for row in guided])
        cases += [Case.compare(f"generate.{name}.tokens", torch.stack(drawn), wanted["tokens"], 0.0),
                  Case.compare(f"generate.{name}.probs", probs, wanted["probs"], TOLERANCE)]
    return cases


def _drawn(model: Janus, prompts: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[list[Tensor], list[list[Any]]]:
    grid = (1, uniforms.shape[1])
    return drive(model, [model.raster(u, grid, contexts(model, prompt.tolist()), sampling, 0, lambda event: None, False)
                         for u, prompt in zip(uniforms, prompts, strict=True)])


# -- mining and the buffer --------------------------------------------------------------------------------------------

def _mining(folder: Path, about: Mapping[str, Any], golden: Mapping[str, Tensor]) -> list[Case]:
    c, given = about["mining"]["config"], _given(golden)
    similarity = given["clip_scores"]
    ce = adversary.shared_ce(given["micro_batch_ce"], c["decoded_micro_bs"], len(similarity))
    sources = [i // c["cand_K"] for i in range(len(similarity))]
    cases = []
    if "candidates" in given:
        cases.append(Case.compare("mining.resized_candidates", adversary.resized(
            given["candidates"], tuple(c["resize_to"])), golden["output.resized_candidates"], EXACT))
    for name, wanted in about["mining"]["outputs"].items():
        mining = Mining(tau=c["clip_tau"], weight=c["clip_lambda"], quantile=c["hard_thresh_q"], top=c["hard_topk"],
                        most=c["hard_push_max_per_step"], variant="released",
                        absolute=c["absolute_threshold"] if name == "absolute" else None)
        hard = adversary.hardness(ce, similarity, mining)
        buffer: HardBuffer[int] = HardBuffer()
        buffer.push((float(hard[i]), i) for i in adversary.mine(hard, similarity, sources, mining))
        kept = buffer.items
        wrong = float(kept != wanted["buffer_candidate_index"])
        cases.append(Case(f"mining.{name}.candidates", wrong, wrong, 0.0))
        if not wrong:
            cases.append(Case.compare(f"mining.{name}.H", hard[kept], torch.tensor(wanted["H"]), EXACT))
            wrong = float([f"q{sources[i]}" for i in kept] != wanted["question"])
            cases.append(Case(f"mining.{name}.question", wrong, wrong, 0.0))
    return cases


def _buffer(folder: Path, about: Mapping[str, Any], golden: Mapping[str, Tensor]) -> list[Case]:
    c = about["buffer"]
    buffer: HardBuffer[int] = HardBuffer(c["capacity"])
    cases, number = [], 0
    for n, (hard, ids) in enumerate(zip(c["pushes"], c["ids_after_each_push"], strict=True)):
        buffer.push((h, number + k) for k, h in enumerate(hard))
        number += len(hard)
        wrong = float(buffer.items != ids)
        cases.append(Case(f"buffer.push.{n}", wrong, wrong, 0.0))
    rows = list(buffer.rows)
    for temperature, row in c["sample"].items():
        buffer.rows = list(rows)
        chances = torch.tensor(row["probabilities"])
        cases.append(Case.compare(f"buffer.{temperature}.probabilities", buffer.probabilities(float(temperature)),
                                  chances, EXACT))
        wrong = float(buffer.pop(row["picked"]) != row["returned_ids"] or buffer.items != row["remaining_ids"])
        cases.append(Case(f"buffer.{temperature}.popped", wrong, wrong, 0.0))
    return cases
