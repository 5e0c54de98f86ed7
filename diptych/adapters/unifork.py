"""UniFork's published layout: a Qwen2 whose upper layers exist twice, with the VILA-U tower and depth head inside.

No weights are released; the golden cases hold outputs of the public code.
"""
import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from diptych.adapters import qwen
from diptych.adapters.cases import Case
from diptych.adapters.keys import Rule, to_ours
from diptych.adapters.vila_u import below, depth_cases, make_depth, make_tokenizer, stated, tokenizer_cases
from diptych.objectives import next_token
from diptych.objectives.guidance import Branch, Guidance
from diptych.objectives.next_token import TokenSampling
from diptych.parts.interleave import GENERATE, IGNORE, UNDERSTAND, Page, Writer
from diptych.parts.language import LanguageConfig
from diptych.parts.tokens import Modality, Mode, Strip, assemble
from diptych.parts.trunks import pick
from diptych.parts.vq import VQTokenizer
from diptych.systems.base import Sampling
from diptych.systems.unifork import UniFork, UniForkConfig
from diptych.systems.works import Deepen, Read, Reader

TOWER = "model.vision_tower.vision_tower."
IMAGE = -200  # stands for a picture among published ids
FIRST = -1  # published label of the token before the first cell
TOLERANCE, LOGITS = 1e-4, 3e-4
TOP_K, TOP_P, SCALE = 900, 0.96, 4.0  # literals of the public sampler
Tensors = Mapping[str, Tensor]


def rules(c: LanguageConfig, shared: int) -> list[Rule]:
    """Those of Qwen2, and again for the layers behind the fork, which are counted from 0 there."""
    out = qwen.rules(c)
    for i in range(shared, c.depth):
        layer, fork = f"model.layers.{i}.", f"model.gen_fork_layers.{i - shared}."
        out += [dataclasses.replace(r, theirs=tuple(t.replace(layer, fork) for t in r.theirs),
                                    ours=re.sub(r"^(trunk\.layers\.\d+\.\w+)\.0\.", r"\1.1.", r.ours))
                for r in qwen.rules(c) if r.theirs[0].startswith(layer)]
    out += [Rule(("model.norm_gen.weight",), "trunk.norm.1.weight"),
            Rule(("model.mm_projector.token_embedding.weight",), "edges.weight")]
    return out + [Rule((f"model.mm_projector.linear{n}.{w}",), f"projector.{2 * n - 2}.{w}")
                  for n in (1, 2) for w in ("weight", "bias")]


def load(folder: str | Path) -> UniFork:
    """A folder with `config.json` and `weights.safetensors`."""
    folder = Path(folder)
    values, theirs = json.loads((folder / "config.json").read_text()), load_file(folder / "weights.safetensors")
    tokenizer = make_tokenizer(values, below(theirs, TOWER + "rqvaesiglip."), folder)
    head = make_depth(values["rqtransformer"], below(theirs, TOWER + "rqtransformer."), folder)
    llm = qwen.config_of(values["llm"] | {"model_type": "qwen2"})
    side = values["decode_grid"] * tokenizer.config.downsample
    model = UniFork(UniForkConfig(
        block=llm.block, depth=llm.depth, shared=values["num_shared_layers"], rope_theta=llm.rope_theta,
        vocabulary_size=llm.vocabulary_size, tie_embeddings=llm.tie_embeddings, drop_text=0.0,
        ends=(values["llm"]["bos_token_id"], values["llm"]["eos_token_id"]), codec=tokenizer.config,
        head=head.config, picture=(side, side)))
    inside = {f"codec.{k}": v for k, v in tokenizer.state_dict().items()}
    inside |= {f"depth_head.{k}": v for k, v in head.state_dict().items()}
    tied = ("head.weight",) if llm.tie_embeddings else ()
    shapes = {k: v.shape for k, v in model.state_dict().items() if k not in inside and k not in tied}
    ignored = (TOWER, "lm_head.") if tied else (TOWER,)
    state, report = to_ours(theirs, rules(llm, values["num_shared_layers"]), shapes, ignored)
    if report:
        raise ValueError(f"expected the published layout in {folder}, got {report}")
    model.load_state_dict({k: v.float() for k, v in state.items()} | inside, strict=not tied)
    return model.eval()


@torch.no_grad()
def parity(folder: Path) -> list[Case]:
    """Every case of a UniFork folder; which ones there are is read from the names of its tensors."""
    golden, model = load_file(folder / "golden.safetensors"), load(folder)
    cases: list[Case] = []
    assert isinstance(model.codec, VQTokenizer)
    for name in sorted({k.split(".")[0] for k in golden}):
        if name == "tokenizer":
            cases += tokenizer_cases(model.codec, golden)
            continue
        if name == "depth_head":
            cases += depth_cases(model.codec, model.depth_head, golden)
            continue
        if name not in _OUTPUTS:
            raise ValueError(f"expected golden cases out of tokenizer, depth_head, {', '.join(_OUTPUTS)}, got {name!r}")
        given, wanted = ({k.removeprefix(f"{name}.{side}."): v for k, v in golden.items()
                          if k.startswith(f"{name}.{side}.")} for side in ("input", "output"))
        own = _OUTPUTS[name](model, given, wanted, folder)
        cases += [Case.compare(f"{name}.{k}", own[k], v, _tolerance(k, v)) for k, v in wanted.items()]
    return cases


def _tolerance(name: str, golden: Tensor) -> float:
    if not golden.is_floating_point():
        return 0.0
    # a picture in 0 .. 255 is 127.5 times one in -1 .. 1
    return LOGITS if "logits" in name else 127.5 * TOLERANCE if name.endswith("0_255") else TOLERANCE


# -- training ---------------------------------------------------------------------------------------------------------

class _Rows:
    """The published rows of one task, pictures in place: `labels` (b, t, depth) as published, `codes` (n, depth)."""

    def __init__(self, model: UniFork, given: Tensors, *, drawn: bool, length: int | None = None) -> None:
        pictures = given["images_gen" if drawn else "images_und"]
        found = model.encode(list(pictures))
        self.model, self.codes, self.grid = model, torch.cat(found), model.grid(pictures[0])
        rows, labels, number = list[Writer](), list[Tensor](), 0
        for b in torch.nonzero(given["is_gen"].bool() == drawn).flatten().tolist():
            seen = given["attention_mask"][b].bool()
            w, told = model.writer(Reader(branch=GENERATE if drawn else UNDERSTAND)), list[Tensor]()
            for token, label in zip(given["input_ids"][b][seen].tolist(), given["labels"][b][seen], strict=True):
                if token == IMAGE:
                    w.code(0, w.plan(self.grid), drawn=drawn, mode=Mode.CAUSAL)
                    told += [torch.tensor(FIRST if drawn else IGNORE), *found[number], torch.tensor(IGNORE)]
                    number += 1
                else:
                    w.text([token], open=False, close=False)
                    told.append(label)
            rows.append(w)
            labels.append(torch.stack([t.expand(model.config.head.depth) for t in told]))
        self.page = Page.of([[w] for w in rows], length)
        size = (*self.page.tokens.shape, model.config.head.depth)
        self.labels = torch.full(size, IGNORE)
        for b, told in enumerate(labels):
            self.labels[b, : len(told)] = told

    def embeds(self) -> Tensor:
        """(b, t, width), zero where there is no token."""
        states = self.model.states(self.page, None, self.model.code_tokens(self.codes))
        out = torch.zeros(self.labels.shape[0] * self.labels.shape[1], states[0].shape[1])
        for index, part in zip(self.page.tokens.routes(2), states, strict=True):
            out[index] = part
        return out.unflatten(0, self.labels.shape[:2])

    def hidden(self, places: Tensor) -> Tensor:
        return pick(self.model.forward_page(self.page, [], self.codes), self.page.tokens, places)


def _train(model: UniFork, given: Tensors, wanted: Tensors, folder: Path) -> dict[str, Tensor]:
    """`loss_gen_firstN`: of the first N cells of every picture only."""
    drawn = _Rows(model, given, drawn=True, length=wanted["gen_inputs_embeds"].shape[1])
    vectors = model.codec.code_vectors(drawn.codes)
    logits = model.depth_head(drawn.hidden(drawn.page.questions), vectors)
    cells = drawn.grid[0] * drawn.grid[1]
    errors = next_token.cross_entropy(logits, drawn.codes).unflatten(0, (-1, cells))
    read = _Rows(model, given, drawn=False)
    answers = read.labels[:, :, 0].roll(-1, 1)
    text = (read.page.tokens.modality == Modality.TEXT) & read.page.tokens.valid()
    answers[:, -1] = IGNORE
    counted = torch.nonzero((answers != IGNORE).flatten() & text.roll(-1, 1).flatten()).flatten()
    said = next_token.cross_entropy(model.head(read.hidden(counted)), answers.flatten()[counted]).mean()
    own = {"gen_inputs_embeds": drawn.embeds(), "gen_labels": drawn.labels,
           "gen_logits": logits.unflatten(0, (-1, cells)), "loss_gen": errors.mean(), "loss_und": said,
           "loss_total": errors.mean() + said}
    for key in wanted:
        if cut := re.fullmatch(r"loss_gen_first(\d+)", key):
            own[key] = errors[:, : int(cut[1])].mean()
    return own


def _branches(model: UniFork, given: Tensors, wanted: Tensors, folder: Path) -> dict[str, Tensor]:
    """The same embeddings down each branch."""
    embeds, out = given["inputs_embeds"], list[Tensor]()
    for branch in (UNDERSTAND, GENERATE):
        strips = []
        for _ in embeds:
            strips.append(Strip())
            strips[-1].add(embeds.shape[1], segment=0, modality=Modality.TEXT, mode=Mode.CAUSAL, route=branch,
                           position=torch.arange(embeds.shape[1]).numpy())
        tokens, states = assemble([[s] for s in strips]), [embeds.new_zeros(0, embeds.shape[2])] * 2
        states[branch] = embeds.flatten(0, 1)
        out.append(model.trunk(states, tokens, model.mask)[branch].unflatten(0, embeds.shape[:2]))
    return {"understanding_hidden": out[0], "generation_hidden": out[1], "understanding_logits": model.head(out[0])}


# -- drawing ----------------------------------------------------------------------------------------------------------

def literals(folder: Path) -> tuple[TokenSampling, float]:
    """Filters and guidance scale, see `vila_u.literals`."""
    top_k = stated(folder, r"top_k (?:literal )?\d+ -> (\d+)", TOP_K)
    sampling = TokenSampling(top_k=int(top_k), top_p=stated(folder, r"top-p \((0?\.\d+)", TOP_P))
    return sampling, stated(folder, r"cfg (\d+(?:\.\d+)?)", SCALE)


def _sample(model: UniFork, given: Tensors, wanted: Tensors, folder: Path) -> dict[str, Tensor]:
    """Prompts, then negative prompts, padded on the left; positions count the pads, as published. The mask has a column
    more than the ids: the token that opens the picture."""
    codes, scale = literals(folder)
    chain = Guidance(branches=(Branch(context="no_text", scale=scale),))
    sampling, count = Sampling(guidance=chain, codes=codes), len(given["uniforms"])
    height, width = (side // model.stride for side in wanted["image_0_255"].shape[-2:])
    readers: list[Reader] = []
    for ids, seen in zip(given["ids"], given["attention_mask"][:, : given["ids"].shape[1]].bool(), strict=True):
        readers.append(Reader(position=int((~seen).sum()), branch=GENERATE))
        w = model.writer(readers[-1])
        w.text(ids[seen].tolist(), open=False, close=False)
        model.run([Read(readers[-1], w)])
    drawn, told = list[Tensor](), list[Tensor]()
    for i, uniforms in enumerate(given["uniforms"].double()):
        contexts = {"full": readers[i], "no_text": readers[count + i]}
        program = model.raster(uniforms, (height, width), contexts, sampling, 0, lambda event: None, False)
        work, steps = next(program), list[Tensor]()
        try:
            while True:
                answer = model.run([work])[0]
                if isinstance(work, Deepen):
                    logits: dict[str, Any] = dict(zip(contexts, answer.split(1), strict=True))
                    steps.append(next_token.guide(logits, chain, 0.0)[0])
                work = program.send(answer)
        except StopIteration as stop:
            drawn.append(stop.value)
        told.append(torch.stack(steps).unflatten(0, (-1, model.config.head.depth)))
    guided, found = torch.stack(told, 2), torch.stack(drawn)  # (cells, depth, pictures, K)
    own = {"codes": found, "guided_logits_last": guided[-1],
           "image_0_255": (model.decode(found, (height, width)) + 1) * 127.5}
    for key in wanted:
        if cut := re.fullmatch(r"guided_logits_first(\d+)", key):
            own[key] = guided[: int(cut[1])]
    return own


_OUTPUTS = {"train": _train, "branches": _branches, "sample": _sample}
