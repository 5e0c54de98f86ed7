"""The tokenizer of the zoo: byte-level BPE over the language of the world, in the file format of `tokenizers`.

Every word of the world is one token (text is lower-cased, marks stand apart, each text gets one space in front: a word
has one form), every byte has a token, and normalised text survives encode and decode. Special tokens are never
read out of text a user typed.
"""
import difflib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from diptych import zoo
from diptych.document import Boxes, Text
from diptych.world.scene import COLORS, SHAPES, SIZES
from diptych.world.tasks import document

LOCATIONS = 64
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
LOCATION_TOKENS = tuple(f"<loc_{i}>" for i in range(LOCATIONS))
VOCABULARY = 1024
SPLIT = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # words, single digits, marks, spaces

# Frequent English beside the world's own words, so that a user's phrasing does not fall into bytes.
COMMON = """the of and to in is it you that he was for on are with as his they be at this have from or one had by but
not what all were we when your can said there use an each which she do how their if will up other about out many then
them these so some her would make like him into time has look two more write go see number no way could people my than
first been call who its now find long down day did get come made may part over new sound take only little work know
place year live me back give most very after thing our just name good sentence think say great where help through much
before line right too mean old any same tell boy follow came want show also around form three small set put end does
another well large must big even such because turn here why ask went men read need different move try kind hand picture
image draw paint edit change remove add color shape object left right above below between near next please"""


class Tokenizer:
    """`encode` and `decode` of plain text; special tokens are asked for by name."""

    def __init__(self, backend: Backend) -> None:
        backend.encode_special_tokens = True  # "<|im_end|>" in a user's text stays text
        self.backend = backend
        self._special = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)

    @classmethod
    def load(cls, file: Path | str | None = None) -> "Tokenizer":
        """From a `tokenizer.json`, that of the zoo by default."""
        file = Path(file or zoo.WEIGHTS / "tokenizer.json")
        if not file.exists():
            raise FileNotFoundError(f"expected a tokenizer at {file}, got none; fix: run `diptych zoo build tokenizer`")
        return cls(Backend.from_file(str(file)))

    def save(self, file: Path | str) -> None:
        Path(file).write_text(self.backend.to_str(pretty=True) + "\n")

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self.backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; special tokens are left out, broken UTF-8 becomes U+FFFD."""
        return self.backend.decode([i for i in ids if i not in self._special], skip_special_tokens=False)

    def id(self, token: str) -> int:
        """The id of a token by its name, such as "<|im_end|>"."""
        found = self.backend.token_to_id(token)
        if found is None:
            near = difflib.get_close_matches(token, [*SPECIAL, *LOCATION_TOKENS], 1, 0.0)
            raise ValueError(f"expected a token of the vocabulary, got {token!r}; fix: did you mean {near[0]!r}?")
        return found

    def location(self, value: float) -> int:
        """The location token of a coordinate in [0, 1]."""
        return self.id(LOCATION_TOKENS[min(max(int(value * LOCATIONS), 0), LOCATIONS - 1)])

    def coordinate(self, token: int) -> float | None:
        """The centre of a location token's interval, None for other tokens."""
        first = self.id(LOCATION_TOKENS[0])
        return (token - first + 0.5) / LOCATIONS if first <= token < first + LOCATIONS else None


# every wording of the world; spelt out, so that a task that asks in the same words leaves the tokenizer as it is
TASKS = ("caption", "question", "draw", "edit", "refer", "layout", "plan", "story")


def world_text(count: int = 200) -> Iterator[str]:
    """Training text: documents of every task in the worlds that have all of them, both groups of wordings, all words
    of the schema."""
    for name in ("mini", "core8", "rich"):
        for task in TASKS:
            for index in range(count):
                held_out = index % 4 == 0
                for piece in document(task, index, world=name, template="held_out" if held_out else "train").pieces:
                    if isinstance(piece, Text) and piece.text:
                        yield piece.text
                    elif isinstance(piece, Boxes):
                        yield from piece.labels
    words = [*SHAPES, *(s + ("es" if s.endswith(("s", "x")) else "s") for s in SHAPES), *COLORS, *SIZES]
    yield " ".join([*words, *COMMON.split()] * 20)


def normalizer() -> normalizers.Normalizer:
    """Users write "How many circles?"; the world writes "how many circles ?". Both become the same tokens."""
    marks = [normalizers.Replace(mark, f" {mark}") for mark in "?!.,:;"]
    return normalizers.Sequence([normalizers.Lowercase(), *marks, normalizers.Replace(Regex(r"\s+"), " "),
                                 normalizers.Strip(), normalizers.Prepend(" ")])


def train(texts: Iterable[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """A byte-level BPE tokenizer; special tokens come first (ids 0 ..), then locations, bytes, merges."""
    backend = Backend(models.BPE())
    backend.normalizer = normalizer()  # type: ignore[assignment]
    backend.pre_tokenizer = pre_tokenizers.Sequence([  # type: ignore[assignment]
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])  # type: ignore[assignment]
    special = [AddedToken(t, special=True, normalized=False) for t in (*SPECIAL, *LOCATION_TOKENS)]
    backend.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return Tokenizer(backend)


def build(out: Path | str | None = None) -> Path:
    """Train on the world and write `tokenizer.json`."""
    from diptych.zoo.build import write

    folder = Path(out or zoo.WEIGHTS)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train(world_text())
    write(folder / "tokenizer.json", tokenizer.save)
    write(folder / "tokenizer.md", lambda temporary: temporary.write_text(CARD.format(
        size=len(tokenizer), special=" ".join(SPECIAL), locations=LOCATIONS)))
    return folder / "tokenizer.json"


CARD = """# tokenizer

Byte-level BPE of {size} tokens in the format of the `tokenizers` library.

- **Vocabulary**: {special}; {locations} location tokens `<loc_0>` ...; 256 bytes; words of the world and of English.
- **Data**: texts of every task of the worlds mini, core8 and rich (all wordings) and the word list in the recipe.
- **Cost**: seconds on one CPU core: `diptych zoo build tokenizer`. Two builds give the same file.
- **Quality**: every word of the world is one token; encode and decode give back text in lower case with marks apart;
  special tokens in a user's text are read as text.
- **Use**: `zoo.load("tokenizer")`, then `encode`, `decode`, `id("<|im_end|>")`, `location(0.5)`.
"""


@lru_cache(1)
def default() -> Tokenizer:
    """The zoo's tokenizer, loaded once."""
    return Tokenizer.load()
