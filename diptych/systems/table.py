"""The index of all papers: a plain table, imported lazily, from which listings, tests and docs are made.

Evidence levels: E1 built and tested, trains and generates on the world; E2 the paper's claim measured against a
control; E3 equal to the published code on golden fixtures; E4 published weights run or a published score reproduced.
"""
import difflib
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diptych.systems.base import System


@dataclass(frozen=True, kw_only=True)
class Row:
    """`home` is "module:Class". `family`: how pictures come about; `coupling`: what seeing and drawing share."""

    title: str
    paper: str  # arXiv id
    year: int
    home: str
    levels: tuple[str, ...]
    about: str
    family: tuple[str, ...] = ()  # one of FAMILIES, or several in the order of their work
    coupling: str = ""
    objective: str = ""


# how pictures come about
FAMILIES = ("flow", "next token", "next scale", "masked tokens", "masked autoregression", "discrete flow")

TABLE: dict[str, Row] = {
    "bagel": Row(title="BAGEL", paper="2505.14683", year=2025, home="diptych.systems.bagel:Bagel", levels=("E1", "E3"),
                 about="mixture of transformers over text, semantic features and flow latents; the house system",
                 family=("flow",), coupling="mixture of transformers: latents have twin parameters, attention is joint",
                 objective="next token for text, flow matching for latents"),
    "janus": Row(title="Janus-Pro", paper="2501.17811", year=2025, home="diptych.systems.janus:Janus",
                 levels=("E1", "E3"),
                 about="a causal language model that reads pictures by features and draws them by codes",
                 family=("next token",), coupling="one dense trunk: features to read, codes to draw",
                 objective="next token for text and for codes, row by row"),
    "fudoki": Row(title="FUDOKI", paper="2505.20147", year=2025, home="diptych.systems.fudoki:Fudoki",
                  levels=("E1", "E2", "E3"),
                  about="discrete flow of text and codes along metric paths, on the network of Janus",
                  family=("discrete flow",), coupling="one dense trunk in which every token sees all others",
                  objective="discrete flow along metric paths, for text and codes"),
    "harmon": Row(title="Harmon", paper="2503.21979", year=2025, home="diptych.systems.harmon:Harmon",
                  levels=("E1", "E2", "E3"),
                  about="a masked-autoregressive encoder that sees and draws, with a language model in its middle",
                  family=("masked autoregression",),
                  coupling="one encoder sees and draws, the language model in its middle",
                  objective="next token for text, sets of hidden latents by a diffusion head"),
    "blip3-o": Row(title="BLIP3-o", paper="2505.09568", year=2025, home="diptych.systems.blip3_o:Blip3o",
                   levels=("E1", "E2", "E3"),
                   about="queries read a frozen vision-language model for a flow over CLIP features",
                   family=("flow",),
                   coupling="serial: queries read a frozen language model for a diffusion transformer",
                   objective="flow matching for semantic features, decoded to pixels"),
    "mammothmoda2": Row(title="MammothModa2", paper="2511.18262", year=2025,
                        home="diptych.systems.mammothmoda2:MammothModa2", levels=("E1", "E2", "E3"),
                        about="a language model plans a picture in codes, a diffusion transformer renders the plan",
                        family=("next token", "flow"),
                        coupling="serial: feed-forward twins plan codes, a diffusion transformer renders them",
                        objective="next token for text and codes, flow matching for latents"),
    "metaquery": Row(title="MetaQuery", paper="2504.06256", year=2025, home="diptych.systems.metaquery:MetaQuery",
                     levels=("E1", "E3"),
                     about="learnt queries read a frozen multimodal language model for a diffusion transformer",
                     family=("flow",),
                     coupling="serial: learnt queries read a frozen language model for a diffusion transformer",
                     objective="flow matching for latents"),
    "seed": Row(title="SEED-LLaMA", paper="2310.01218", year=2023, home="diptych.systems.seed:Seed",
                levels=("E1", "E2", "E3"),
                about="a language model whose words are also causal semantic codes of pictures",
                family=("next token",), coupling="one dense trunk: pictures are words of the language model",
                objective="next token for text and causal semantic codes, pixels by a flow decoder"),
    "emu3": Row(title="Emu3", paper="2409.18869", year=2024, home="diptych.systems.emu3:Emu3", levels=("E1", "E3"),
                about="a language model from scratch, to which pictures of any aspect are rows of words",
                family=("next token",), coupling="one dense trunk: pictures are words of the language model",
                objective="next token for text, codes, and what stands between them"),
    "hbridge": Row(title="HBridge", paper="2511.20520", year=2025, home="diptych.systems.hbridge:HBridge",
                   levels=("E1", "E2"),
                   about="a language model that reads and a diffusion transformer that draws, joined in the middle",
                   family=("flow",), coupling="H: a reader and a painter, joined in the middle layers only",
                   objective="next token for text, flow matching for latents, semantic tokens beside them"),
    "vargpt": Row(title="VARGPT-v1.1", paper="2504.02949", year=2025, home="diptych.systems.vargpt:Vargpt",
                  levels=("E1", "E2", "E3"),
                  about="a language model with a second transformer behind it that draws bits from scale to scale",
                  family=("next scale",), coupling="a second transformer behind the language model",
                  objective="next token for text, bits from scale to scale for pictures"),
    "tokenflow": Row(title="TokenFlow", paper="2412.03069", year=2024, home="diptych.systems.tokenflow:TokenFlow",
                     levels=("E1", "E2", "E3"),
                     about="two language models, to read and to draw from scale to scale, on codes of meaning and "
                           "looks",
                     family=("next scale",), coupling="two dense trunks on the same codes, one reads and one draws",
                     objective="next token for text, codes of meaning and looks from scale to scale"),
    "latte-flow": Row(title="LaTtE-Flow", paper="2506.06952", year=2025, home="diptych.systems.latte_flow:LatteFlow",
                      levels=("E1", "E2"),
                      about="the layers of a flow model are shared out over time; a step runs a part of them",
                      family=("flow",), coupling="twin layers shared out over time, beside those of the reader",
                      objective="next token for text, flow matching for latents"),
    "show-o": Row(title="Show-o", paper="2408.12528", year=2024, home="diptych.systems.show_o:ShowO",
                  levels=("E1", "E3"),
                  about="one transformer that says texts token by token and fills in masked codes of pictures",
                  family=("masked tokens",), coupling="one dense trunk: texts are causal, a picture sees itself whole",
                  objective="next token for text, masked codes for pictures"),
    "mmada": Row(title="MMaDA", paper="2505.15809", year=2025, home="diptych.systems.mmada:Mmada",
                 levels=("E1", "E3"),
                 about="one transformer that fills in masked tokens, of texts block by block and of pictures",
                 family=("masked tokens",), coupling="one dense trunk in which every token sees all others",
                 objective="masked tokens, of texts weighted by how many are hidden, and of pictures"),
    "unifork": Row(title="UniFork", paper="2506.17202", year=2025, home="diptych.systems.unifork:UniFork",
                   levels=("E1", "E2", "E3"),
                   about="lower layers for both tasks, then a branch to understand and one to draw residual codes",
                   family=("next token",), coupling="Y: shared lower layers, a branch per task above",
                   objective="next token for text, residual codes by a depth transformer"),
    "unipic2": Row(title="UniPic 2.0", paper="2509.04548", year=2025, home="diptych.systems.unipic2:UniPic2",
                   levels=("E1", "E3"),
                   about="queries read a frozen vision-language model for a diffusion transformer that draws and edits "
                         "in two streams",
                   family=("flow",),
                   coupling="serial: learnt queries read a frozen language model for a transformer in two streams",
                   objective="flow matching for latents, beside clean ones of the picture to edit"),
}


# Systems that are no paper: ingredients in the roles that papers take from the hub.
TOOLS: dict[str, str] = {
    "vlm": "diptych.systems.vlm:Vlm",
    "autoencoder": "diptych.systems.autoencoder:Autoencoder",
    "semantic-codec": "diptych.systems.semantic_codec:SemanticCodec",
    "code-tokenizer": "diptych.systems.code_tokenizer:CodeTokenizer",
    "dual-codec": "diptych.systems.dual_codec:DualCodec",
}


def homes() -> dict[str, str]:
    """name -> "module:Class" of everything that trains and loads."""
    return {name: row.home for name, row in TABLE.items()} | TOOLS


def find(name: str) -> "type[System]":
    """The class of a system or tool by its name."""
    known = homes()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.0)
        raise ValueError(f"expected a system out of {', '.join(known)}, got {name!r}; fix: did you mean {near[0]!r}?")
    module, _, attribute = known[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def name_of(cls: type) -> str:
    """The name of a paper's class in the table; the class name of a tool."""
    return next((name for name, row in TABLE.items() if row.home.endswith(f":{cls.__name__}")), cls.__name__)


def find_class(class_name: str) -> "type[System]":
    """The class of a system or tool by its class name, as saved folders state it."""
    known = {home.partition(":")[2]: name for name, home in homes().items()}
    if class_name not in known:
        raise ValueError(f"expected the class of a system ({', '.join(known)}), got {class_name!r}")
    return find(known[class_name])
