"""OpenVLA (arXiv 2406.09246) as RLinf-VLA trains it: two vision towers, a projector, LLaMA, actions as its last words,
a value head. A folder holds `config.json` and weights with the published keys, and those of the value head.

A row is a begin token, the patches of a picture, a prompt and the tokens of an action. What a padded prompt leaves out
is left out here, positions follow. Towers stop one block early and drop what is no patch, without a last norm.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.adapters.cases import Fixture
from diptych.adapters.keys import Rule, expand, to_ours
from diptych.adapters.qwen import rules as language_rules
from diptych.adapters.tensors import Tensors, need_weights, read_json
from diptych.alignment import surrogate
from diptych.alignment.critic import ValueHead
from diptych.objectives import next_token
from diptych.objectives.next_token import TokenSampling
from diptych.parts.actions import ActionRange, ActionTokenizer
from diptych.parts.blocks import BlockConfig
from diptych.parts.language import LanguageConfig, LanguageModel
from diptych.parts.towers import Tower, TowerConfig

EXACT, NETWORK, GRADIENT = 1e-5, 2e-4, 1e-3
TOWERS = {"dino": "vision_backbone.featurizer.", "siglip": "vision_backbone.fused_featurizer."}
BINS = 256
SAMPLINGS = {"t1": TokenSampling(), "t16_topk": TokenSampling(temperature=1.6, top_k=100)}
# sizes by the names of timm
SIZES: dict[str, dict[str, Any]] = {
    "vit_large_patch14_reg4_dinov2.lvd142m": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "mlp_ratio": 4},
    "vit_so400m_patch14_siglip_224": {"embed_dim": 1152, "depth": 27, "num_heads": 16, "mlp_ratio": 3.7362}}
PATCH, REGISTERS = 14, 4


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    dino: TowerConfig
    siglip: TowerConfig
    language: LanguageConfig
    tokenizer: ActionTokenizer
    dimensions: int  # tokens of an action
    value_hidden: tuple[int, ...]
    values: int

    @classmethod
    def from_published(cls, c: Mapping[str, Any]) -> "PolicyConfig":
        names, text, rl = c["timm_model_ids"], c["text_config"], c["rl"]
        if list(names) != list(SIZES) or not c["arch_specifier"].endswith("fused-gelu-mlp"):
            raise ValueError(f"expected the towers {', '.join(SIZES)} and a fused-gelu-mlp, got {', '.join(names)} and "
                             f"{c['arch_specifier']!r}")
        towers = []
        for name, side, changes in zip(names, c["image_sizes"], c.get("tiny_vit_overrides", ({}, {})), strict=True):
            s, dino = SIZES[name] | changes, "dinov2" in name
            towers.append(TowerConfig(
                width=s["embed_dim"], mlp_width=int(s["embed_dim"] * s["mlp_ratio"]), layers=s["depth"] - 1,
                heads=s["num_heads"], patch=PATCH, side=side // PATCH, gelu="exact", class_token=dino,
                registers=REGISTERS * dino, layer_scale=dino))
        heads = text["num_attention_heads"]
        block = BlockConfig(width=text["hidden_size"], heads=heads, kv_heads=text.get("num_key_value_heads") or heads,
                            head_dim=text["hidden_size"] // heads, hidden=text["intermediate_size"], qkv_bias=False,
                            norm_eps=text["rms_norm_eps"])
        language = LanguageConfig(block=block, depth=text["num_hidden_layers"], vocabulary_size=text["vocab_size"],
                                  rope_theta=float(text.get("rope_theta", 1e4)))
        tokenizer = ActionTokenizer(vocabulary_size=text["vocab_size"] - c["pad_to_multiple_of"],
                                    bins=c.get("n_action_bins", BINS))
        return cls(dino=towers[0], siglip=towers[1], language=language, tokenizer=tokenizer,
                   dimensions=rl["action_dim"] * rl["num_action_chunks"],
                   value_hidden=tuple(rl["value_head"]["hidden_sizes"]), values=rl["value_head"]["output_dim"])


class Policy(nn.Module):
    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        c = self.config = config
        width, inside = c.language.block.width, c.dino.width + c.siglip.width
        self.dino, self.siglip = Tower(c.dino), Tower(c.siglip)
        self.projector = nn.ModuleList(nn.Linear(a, b) for a, b in ((inside, 4 * inside), (4 * inside, width),
                                                                    (width, width)))
        self.language = LanguageModel(c.language)
        self.value = ValueHead(width, c.values, c.value_hidden)

    def features(self, pixels: Tensor) -> Tensor:
        """Pictures (b, 6, h, w), each prepared for either tower -> patches (b, p, channels of both)."""
        return torch.cat([tower(x).flatten(2).transpose(1, 2)
                          for tower, x in zip((self.dino, self.siglip), pixels.split(3, 1), strict=True)], -1)

    def project(self, features: Tensor) -> Tensor:
        first, second, third = self.projector
        return third(F.gelu(second(F.gelu(first(features)))))

    def forward(self, patches: Tensor, prompts: Sequence[Tensor], actions: Tensor) -> Tensor:
        """Projected patches (b, p, width), ids of prompts with their begin token, ids (b, d) of actions -> states
        (b, d, width) from which each token of an action is predicted, and one more, from which nothing is."""
        rows = []
        for own, prompt, action in zip(patches, prompts, actions, strict=True):
            words = self.language.embed(torch.cat((prompt, action)))
            rows.append(torch.cat((words[:1], own, words[1:])))
        states = self.language.states(torch.cat(rows), [len(r) for r in rows]).split([len(r) for r in rows])
        return torch.stack([s[-actions.shape[1] - 1:] for s in states])


def rules(c: PolicyConfig) -> list[Rule]:
    out = [Rule(tuple(f"language_model.{t}" for t in r.theirs), f"language.{r.ours}", r.sizes)
           for r in language_rules(c.language)]
    both = ("weight", "bias")
    out += [Rule((f"projector.fc{i + 1}.{w}",), f"projector.{i}.{w}") for i in range(3) for w in both]
    depth = len(c.value_hidden)
    out += [Rule((f"value_head.mlp.{2 * i}.{w}",), f"value.layers.{i}.{w}") for i in range(depth) for w in both]
    out.append(Rule((f"value_head.mlp.{2 * depth}.weight",), "value.last.weight"))
    for ours, theirs in TOWERS.items():
        out += _tower_rules(c.dino if ours == "dino" else c.siglip, f"{ours}.", theirs)
    return out


def _tower_rules(c: TowerConfig, ours: str, theirs: str) -> list[Rule]:
    both, w = ("weight", "bias"), c.width
    out = [Rule((f"{theirs}patch_embed.proj.{k}",), f"{ours}patch_embedding.{k}") for k in both]
    out.append(Rule((f"{theirs}pos_embed",), f"{ours}positions", shape=(1, c.side**2, w)))
    if c.class_token:
        out.append(Rule((f"{theirs}cls_token",), f"{ours}class_token", shape=(1, 1, w)))
    if c.registers:
        out.append(Rule((f"{theirs}reg_token",), f"{ours}registers", shape=(1, c.registers, w)))
    names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj", "mlp.fc1": "mlp.fc1",
             "mlp.fc2": "mlp.fc2"}
    block, layer = f"{theirs}blocks.{{i}}.", f"{ours}layers.{{i}}."
    inner = [Rule((f"{block}{t}.{k}",), f"{layer}{o}.{k}") for t, o in names.items() for k in both]
    inner += [Rule((f"{block}attn.qkv.{k}",), f"{layer}self_attn.{p}_proj.{k}", part=(n, 3))
              for n, p in enumerate("qkv") for k in both]
    if c.layer_scale:
        inner += [Rule((f"{block}ls{n}.scale_factor",), f"{layer}scale{n}") for n in (1, 2)]
    return out + [r for rule in inner for r in expand(rule, i=range(c.layers))]


def load(folder: Path) -> Policy:
    c = PolicyConfig.from_published(read_json(folder / "config.json"))
    policy = Policy(c)
    unused = [f"{prefix}{name}" for prefix, t in zip(TOWERS.values(), (c.dino, c.siglip), strict=True)
              for name in ("norm.", "attn_pool.", f"blocks.{t.layers}.")]
    shapes = {k: v.shape for k, v in policy.state_dict().items()}
    tensors, report = to_ours(Tensors({"": need_weights(folder)}), rules(c), shapes, unused)
    if report:
        raise ValueError(f"expected the weights of {folder} to fit, got {report}")
    policy.load_state_dict(tensors)
    return policy


# -- the golden cases -------------------------------------------------------------------------------------------------

def compare(f: Fixture) -> None:
    """Features, logits, log-probs under either sampling, values, gradients, the likeliest actions."""
    policy, given = load(f.folder), f.given("policy")
    c, actions = policy.config, given["action_tokens"].flatten(1)
    prompts = [ids[mask] for ids, mask in zip(given["input_ids"], given["attention_mask"].bool(), strict=True)]
    features = policy.features(given["pixel_values"].flatten(0, 1))
    patches = policy.project(features)
    states = policy(patches, prompts, actions)
    logits, values = policy.language.head(states[:, :-1]), policy.value(states[:, 0])
    f.compare("policy", {"vision_features": features, "projected": patches, "logits_last": logits}, NETWORK)
    for name in f.names("policy"):
        wanted = f.wanted(f"policy.{name}")
        if name == "greedy":
            _greedy(f, policy, patches, prompts)
            continue
        # cut over the whole vocabulary, then restricted, as it is trained
        scores = next_token.restrict(next_token.log_probs(logits, SAMPLINGS[name]), c.tokenizer.ids)
        log_probs = surrogate.token_log_probs(scores, actions)
        f.compare(f"policy.{name}", {"logprobs": log_probs, "entropy": surrogate.entropy(scores), "values": values},
                  NETWORK)
        if "grad_projector_fc1" in wanted:
            weights = {"grad_projector_fc1": "projector.0.weight", "grad_value_head_mlp_0": "value.layers.0.weight"}
            found = torch.autograd.grad(log_probs.mean() + values.mean(),
                                        [policy.get_parameter(w) for w in weights.values()], retain_graph=True)
            own = {k: g[:len(wanted[k])] for k, g in zip(weights, found, strict=True)}
            f.compare(f"policy.{name}", own, GRADIENT, "relative")


@torch.no_grad()
def _greedy(f: Fixture, policy: Policy, patches: Tensor, prompts: Sequence[Tensor]) -> None:
    """Token by token, each the likeliest of the actions."""
    c = policy.config
    ids = torch.empty(len(prompts), 0, dtype=torch.int64)
    for _ in range(c.dimensions):
        scores = next_token.restrict(policy.language.head(policy(patches, prompts, ids)[:, -1]), c.tokenizer.ids)
        ids = torch.cat((ids, scores.argmax(-1, keepdim=True)), 1)
    f.compare("policy.greedy", {"ids": ids}, 0.0)
    [about] = read_json(f.folder / "config.json")["norm_stats"].values()
    own = ActionRange.from_published(about["action"]).restore(c.tokenizer.decode(ids))
    f.compare("policy.greedy", {"actions64": own}, EXACT)
