"""Talk with pictures in both directions: one document that grows."""
import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.cli import common

if TYPE_CHECKING:
    from diptych.document import Document, Piece
    from diptych.systems.base import System

HELP = """\
TEXT            say something; the model answers in words
/image PATH     show the model a picture
/draw TEXT      let the model draw (or change the picture it has seen)
/find TEXT      let the model point: boxes as x0 y0 x1 y1
/save PATH      the last picture (.png, .jpg), or the whole conversation (.json)
/load PATH      go on with a saved conversation
/undo           forget the last exchange
/new            start again
/help           this list
/quit           leave (also: end of input)"""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", nargs="?", help="a picture to begin with")
    common.add_sampling(parser)
    common.add_model(parser)


def run(args: argparse.Namespace) -> int:
    system = common.load_model(args)
    chat = Chat(system, args)
    if args.image:
        chat.command("image", args.image)
    interactive = sys.stdin.isatty()
    if interactive:
        print(f"{args.model}. /help lists what you can do.")
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return 0
        if line in ("/quit", "/exit"):
            return 0
        try:
            chat.line(line)
        except (ValueError, OSError) as error:
            # A typing mistake must not end a conversation.
            print(f"error: {error}")


class Chat:
    """The state of a conversation: pieces, and where each exchange began."""

    def __init__(self, system: "System", args: argparse.Namespace) -> None:
        self.system, self.args = system, args
        self.pieces: list[Piece] = []
        self.starts: list[int] = []

    def line(self, line: str) -> None:
        if line.startswith("/"):
            verb, _, rest = line[1:].partition(" ")
            self.command(verb, rest.strip())
        elif line:
            from diptych.document import Text

            self.exchange(line, Text(role="assistant", target=True))

    def command(self, verb: str, rest: str) -> None:
        commands = {"image": self.image, "draw": self.draw, "find": self.find, "save": self.save, "load": self.load}
        if verb in commands:
            if not rest:
                raise ValueError(f"expected something after /{verb}, got nothing; fix: /help")
            commands[verb](rest)
        elif verb == "undo":
            if not self.starts:
                raise ValueError("expected an exchange to forget, got an empty conversation")
            del self.pieces[self.starts.pop():]
        elif verb == "new":
            self.pieces, self.starts = [], []
        elif verb == "help":
            print(HELP)
        else:
            raise common.unknown("a command", verb, [*commands, "undo", "new", "help", "quit"])

    def image(self, path: str) -> None:
        image = common.read_picture(path, self.system)
        self.starts.append(len(self.pieces))
        self.pieces.append(image)

    def draw(self, text: str) -> None:
        from diptych.document import Image

        self.exchange(text, Image(role="assistant", target=True))
        height, width = self.pieces[-1].size  # type: ignore[attr-defined]
        print(f"({width} x {height} picture; /save PATH keeps it)")

    def find(self, text: str) -> None:
        from diptych.document import Boxes

        self.exchange(text, Boxes(role="assistant", target=True))
        boxes: Any = self.pieces[-1]
        for i, box in enumerate(boxes.boxes):
            print(*([boxes.labels[i]] if boxes.labels else []), *(f"{v:.3f}" for v in box))
        if not len(boxes.boxes):
            print("(nothing found)")

    def exchange(self, text: str, answer: "Piece") -> None:
        """Say `text`, let the model fill `answer`; both stay only if that succeeds."""
        from diptych.document import Document, Text

        asked = [*self.pieces, Text(text=text)]
        sampling = common.sampling_of(self.system, self.args)
        # What was said before is context now: only the new piece is still to be produced.
        document = Document((*(p.replace(target=False) for p in asked), answer))
        [made] = self.system.generate([document], sampling, seeds=self.args.seed + len(self.starts),
                                      emit=common.stream_text)
        if isinstance(answer, Text):
            print()
        self.starts.append(len(self.pieces))
        self.pieces = list(made)

    def save(self, path: str) -> None:
        from diptych.data.images import write_image
        from diptych.document import Image

        target = Path(path)
        if target.suffix == ".json":
            temporary = target.with_name(f".{target.name}.part")
            temporary.write_text(self.document().to_json(), encoding="utf-8")
            temporary.replace(target)
        else:
            pictures = self.document().of(Image)
            if not pictures:
                raise ValueError("expected a picture in the conversation, got none; fix: /image PATH or /draw TEXT")
            write_image(pictures[-1], target)
        print(f"saved: {target}")

    def load(self, path: str) -> None:
        from diptych.document import Document

        self.pieces = list(Document.from_json(Path(path).read_text(encoding="utf-8")))
        self.starts = [0]

    def document(self) -> "Document":
        from diptych.document import Document

        return Document(tuple(self.pieces), "chat")
