"""BAGEL once more, straight from its description: dense attention over the whole sequence, no caches, loops wherever
they are plainer. Shares no code with the library, so that both can be compared. Time and velocity are the release's:
t from 1 (noise) to 0, velocity = noise - data."""
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor


class Reference:
    def __init__(self, folder: Path, marks: dict[str, int]) -> None:
        self.w, self.ae = load_file(folder / "ema.safetensors"), load_file(folder / "ae.safetensors")
        self.llm, self.vit, self.own = (json.loads((folder / f"{n}_config.json").read_text()) if n else
                                        json.loads((folder / "config.json").read_text()) for n in ("llm", "vit", ""))
        self.marks, self.mixture = marks, self.llm["layer_module"] == "Qwen2MoTDecoderLayer"

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.w[f"{name}.weight"].T
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def rms(self, name: str, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.llm["rms_norm_eps"]).sqrt() * self.w[f"{name}.weight"]

    # -- positions ----------------------------------------------------------------------------------------------------

    def cells(self, rows: int, columns: int, side: int) -> list[tuple[int, int]]:
        """Which row and column of a table each patch uses."""
        if self.own["interpolate_pos"]:
            return [(r * side // rows, c * side // columns) for r in range(rows) for c in range(columns)]
        return [(r, c) for r in range(rows) for c in range(columns)]

    def sines(self, cells: list[tuple[int, int]]) -> Tensor:
        """Fixed table: the column's sines and cosines, then the row's."""
        quarter = self.llm["hidden_size"] // 4
        omega = [10000 ** (-i / quarter) for i in range(quarter)]
        return torch.tensor([[f(axis * o) for axis in (c, r) for f in (math.sin, math.cos) for o in omega]
                             for r, c in cells])

    # -- understanding encoder ----------------------------------------------------------------------------------------

    def grid(self, image: Tensor, patch: int) -> tuple[int, int]:
        return image.shape[1] // patch, image.shape[2] // patch

    def features(self, image: Tensor) -> Tensor:
        v, p, root = self.vit, self.vit["patch_size"], "vit_model.vision_model"
        rows, columns = self.grid(image, p)
        patches = [image[:, r * p:(r + 1) * p, c * p:(c + 1) * p].permute(1, 2, 0).flatten()
                   for r in range(rows) for c in range(columns)]
        ids = [r * self.own["vit_max_num_patch_per_side"] + c
               for r, c in self.cells(rows, columns, self.own["vit_max_num_patch_per_side"])]
        x = self.linear(f"{root}.embeddings.patch_embedding", torch.stack(patches))
        x = x + self.w[f"{root}.embeddings.position_embedding.weight"][ids]

        def norm(name: str, x: Tensor) -> Tensor:
            spread = (x.var(-1, keepdim=True, correction=0) + v["layer_norm_eps"]).sqrt()
            return (x - x.mean(-1, keepdim=True)) / spread * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

        for n in range(v["num_hidden_layers"]):
            layer = f"{root}.encoder.layers.{n}"
            h = norm(f"{layer}.layer_norm1", x)
            each = [self.linear(f"{layer}.self_attn.{a}_proj", h).chunk(v["num_attention_heads"], 1) for a in "qkv"]
            heads = [torch.softmax(q @ k.T / q.shape[1] ** 0.5, 1) @ value for q, k, value in zip(*each, strict=True)]
            x = x + self.linear(f"{layer}.self_attn.out_proj", torch.cat(heads, 1))
            h = F.gelu(self.linear(f"{layer}.mlp.fc1", norm(f"{layer}.layer_norm2", x)), approximate="tanh")
            x = x + self.linear(f"{layer}.mlp.fc2", h)
        x = self.linear("connector.fc1", norm(f"{root}.post_layernorm", x))
        return self.linear("connector.fc2", F.gelu(x, approximate="tanh"))

    # -- the network over one whole sequence --------------------------------------------------------------------------

    def sequence(self, parts: list[tuple[str, Any]]) -> tuple[Tensor, list[int], list[tuple[int, str]], list[bool]]:
        """Embeddings, positions, (split, mode) and "generation expert" of every token."""
        rows: list[Tensor] = []
        positions: list[int] = []
        splits: list[tuple[int, str]] = []
        generation: list[bool] = []
        words, place = self.w["language_model.model.embed_tokens.weight"], 0
        for split, (kind, content) in enumerate(parts):
            if kind == "text":
                for i in content:
                    rows.append(words[i])
                    positions.append(place)
                    splits.append((split, "causal"))
                    generation.append(False)
                    place += 1
                continue
            if kind == "vit":
                side = self.own["vit_max_num_patch_per_side"]
                rows_columns = self.grid(content, self.vit["patch_size"])
                inner = self.features(content) + self.sines(self.cells(*rows_columns, side))
            else:
                x, (height, width), t = content
                angle = torch.tensor([t * 10000 ** (-i / 128) for i in range(128)])
                time = self.linear("time_embedder.mlp.0", torch.cat((angle.cos(), angle.sin())))
                inner = self.linear("vae2llm", x) + self.linear("time_embedder.mlp.2", time * torch.sigmoid(time))
                inner = inner + self.sines(self.cells(height, width, self.own["max_latent_size"]))
            block = [words[self.marks["start_of_image"]], *inner, words[self.marks["end_of_image"]]]
            rows += block
            positions += [place] * len(block)
            splits += [(split, "noise" if kind == "noise" else "full")] * len(block)
            generation += [False, *[kind != "vit"] * len(inner), False]
            place += kind != "noise"
        return torch.stack(rows), positions, splits, generation

    def forward(self, parts: list[tuple[str, Any]]) -> Tensor:
        c = self.llm
        x, positions, splits, generation = self.sequence(parts)
        heads, kv = c["num_attention_heads"], c["num_key_value_heads"]
        head = c["hidden_size"] // heads
        allow = torch.tensor([[(k <= q or (splits[k] == splits[q] and splits[k][1] != "causal"))
                               and not (splits[k][1] == "noise" and splits[k] != splits[q])
                               for k in range(len(x))] for q in range(len(x))])
        angle = torch.tensor([[p * c["rope_theta"] ** (-2 * i / head) for i in range(head // 2)] for p in positions])
        cos, sin = torch.cat((angle, angle), 1).cos(), torch.cat((angle, angle), 1).sin()
        experts = [("", torch.tensor([not g or not self.mixture for g in generation]))]
        experts += [("_moe_gen", torch.tensor(generation))] if self.mixture else []

        def routed(function: Any, *inputs: Tensor) -> Tensor:
            out: Tensor | None = None
            for suffix, chosen in experts:
                part = function(suffix, *(i[chosen] for i in inputs))
                out = part.new_zeros(len(x), part.shape[1]) if out is None else out
                out[chosen] = part
            assert out is not None
            return out

        for n in range(c["num_hidden_layers"]):
            layer = f"language_model.model.layers.{n}"
            h = routed(lambda s, a, layer=layer: self.rms(f"{layer}.input_layernorm{s}", a), x)
            mixed = []
            projected = {p: routed(lambda s, a, layer=layer, p=p: self.linear(f"{layer}.self_attn.{p}_proj{s}", a), h)
                         for p in "qkv"}
            for number in range(heads):
                vectors = []
                for p, index in (("q", number), ("k", number * kv // heads)):
                    y = projected[p][:, index * head:(index + 1) * head]
                    if c["qk_norm"]:
                        y = routed(lambda s, a, layer=layer, p=p: self.rms(f"{layer}.self_attn.{p}_norm{s}", a), y)
                    vectors.append(y * cos + torch.cat((-y[:, head // 2:], y[:, : head // 2]), 1) * sin)
                scores = (vectors[0] @ vectors[1].T / head**0.5).masked_fill(~allow, float("-inf"))
                index = number * kv // heads
                mixed.append(torch.softmax(scores, 1) @ projected["v"][:, index * head:(index + 1) * head])
            together = torch.cat(mixed, 1)
            x = x + routed(lambda s, a, layer=layer: self.linear(f"{layer}.self_attn.o_proj{s}", a), together)

            def feed_forward(s: str, a: Tensor, layer: str = layer) -> Tensor:
                a = self.rms(f"{layer}.post_attention_layernorm{s}", a)
                gate, up = (self.linear(f"{layer}.mlp{s}.{n}_proj", a) for n in ("gate", "up"))
                return self.linear(f"{layer}.mlp{s}.down_proj", gate * torch.sigmoid(gate) * up)

            x = x + routed(feed_forward, x)
        return routed(lambda s, a: self.rms(f"language_model.model.norm{s}", a), x)

    def logits(self, parts: list[tuple[str, Any]]) -> Tensor:
        tied = self.llm["tie_word_embeddings"]
        head = self.w["language_model.model.embed_tokens.weight" if tied else "language_model.lm_head.weight"]
        return self.forward(parts) @ head.T

    # -- drawing ------------------------------------------------------------------------------------------------------

    def draw(self, noise: Tensor, grid: tuple[int, int], contexts: dict[str, list[tuple[str, Any]]],
             options: dict[str, Any]) -> Tensor:
        """`contexts`: full, no_text and no_image; `options`: steps, shift, interval, text, image, renorm, floor."""
        s = options["shift"]
        times = [s * u / (1 + (s - 1) * u) for u in (1 - i / (options["steps"] - 1) for i in range(options["steps"]))]
        x, low, high = noise, *options["interval"]
        text, image, renorm = options["text"], options["image"], options["renorm"]
        for t, to in pairwise(times):
            def velocity(name: str, x: Tensor = x, t: float = t) -> Tensor:
                hidden = self.forward([*contexts[name], ("noise", (x, grid, t))])
                return self.linear("llm2vae", hidden[-len(x) - 1 : -1])

            v = velocity("full")
            if low < t <= high and text > 1:
                base, plain = velocity("no_text"), v
                v = base + text * (v - base)
                if renorm == "text_channel":
                    v = v * self._shrink(plain, v, 1, options["floor"])
                if image > 1:
                    base = velocity("no_image")
                    v = base + image * (v - base)
                if renorm != "text_channel":
                    v = v * self._shrink(plain, v, None if renorm == "global" else 1, options["floor"])
            x = x - v * (t - to)
        return x

    @staticmethod
    def _shrink(plain: Tensor, v: Tensor, dim: int | None, floor: float) -> Tensor:
        squares = [(a**2).sum() if dim is None else (a**2).sum(dim, keepdim=True) for a in (plain, v)]
        return (squares[0].sqrt() / (squares[1].sqrt() + 1e-8)).clamp(min=floor, max=1.0)

    # -- codec --------------------------------------------------------------------------------------------------------

    def _conv(self, name: str, x: Tensor, **kwargs: int) -> Tensor:
        return F.conv2d(x, self.ae[f"{name}.weight"], self.ae[f"{name}.bias"], **kwargs)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        groups = x.unflatten(1, (32, -1)).flatten(2)
        groups = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, keepdim=True, correction=0) + 1e-6).sqrt()
        weight, bias = (self.ae[f"{name}.{n}"][:, None, None] for n in ("weight", "bias"))
        return groups.reshape(x.shape) * weight + bias

    def _block(self, name: str, x: Tensor) -> Tensor:
        h = self._conv(f"{name}.conv1", F.silu(self._norm(f"{name}.norm1", x)), padding=1)
        h = self._conv(f"{name}.conv2", F.silu(self._norm(f"{name}.norm2", h)), padding=1)
        return h + (self._conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.ae else x)

    def _middle(self, name: str, x: Tensor) -> Tensor:
        x = self._block(f"{name}.block_1", x)
        q, k, v = (self._conv(f"{name}.attn_1.{n}", self._norm(f"{name}.attn_1.norm", x)).flatten(2)[0] for n in "qkv")
        h = (torch.softmax(q.T @ k / q.shape[0] ** 0.5, 1) @ v.T).T.reshape(x.shape)
        return self._block(f"{name}.block_2", x + self._conv(f"{name}.attn_1.proj_out", h))

    def encode(self, image: Tensor) -> Tensor:
        """(3, h, w) -> scaled posterior mean (1, z, h / 8, w / 8)."""
        c = self.own["vae_config"]
        x = self._conv("encoder.conv_in", image[None], padding=1)
        for level in range(len(c["ch_mult"])):
            for block in range(c["num_res_blocks"]):
                x = self._block(f"encoder.down.{level}.block.{block}", x)
            if level < len(c["ch_mult"]) - 1:
                x = self._conv(f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        x = F.silu(self._norm("encoder.norm_out", self._middle("encoder.mid", x)))
        mean = self._conv("encoder.conv_out", x, padding=1)[:, : c["z_channels"]]
        return (mean - c["shift_factor"]) * c["scale_factor"]

    def decode(self, latent: Tensor) -> Tensor:
        c = self.own["vae_config"]
        x = self._conv("decoder.conv_in", latent / c["scale_factor"] + c["shift_factor"], padding=1)
        x = self._middle("decoder.mid", x)
        for level in reversed(range(len(c["ch_mult"]))):
            for block in range(c["num_res_blocks"] + 1):
                x = self._block(f"decoder.up.{level}.block.{block}", x)
            if level:
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                x = self._conv(f"decoder.up.{level}.upsample.conv", x, padding=1)
        return self._conv("decoder.conv_out", F.silu(self._norm("decoder.norm_out", x)), padding=1)

    def tokens(self, latent: Tensor) -> Tensor:
        """(1, z, h, w) -> tokens, channel last inside."""
        p, (rows, columns) = self.own["latent_patch_size"], self.latent_grid(latent)
        return torch.stack([latent[0, :, r * p:(r + 1) * p, c * p:(c + 1) * p].permute(1, 2, 0).flatten()
                            for r in range(rows) for c in range(columns)])

    def latent_grid(self, latent: Tensor) -> tuple[int, int]:
        p = self.own["latent_patch_size"]
        return latent.shape[2] // p, latent.shape[3] // p

    def cells_of(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """The way back: tokens -> (1, z, h, w)."""
        p, (rows, columns) = self.own["latent_patch_size"], grid
        out = torch.zeros(1, tokens.shape[1] // p**2, rows * p, columns * p)
        for n, token in enumerate(tokens):
            r, c = divmod(n, columns)
            out[0, :, r * p:(r + 1) * p, c * p:(c + 1) * p] = token.reshape(p, p, -1).permute(2, 0, 1)
        return out
