"""The loss of an answer about a drawing, with a gradient that reaches the drawing (UniRL, arXiv 2505.23380, its
supervised form).

Every code of the drawing becomes a row of a simplex by the straight-through Gumbel-softmax (arXiv 1611.01144):

    g     noise under which the code that was drawn is the largest of log p + g                 (arXiv 1411.0030)
    y     onehot(code) + softmax((log p + g) / tau) - stop_gradient(softmax((log p + g) / tau))
    state of the cell, where the picture is read = y @ table of code states

So what is read is what was drawn, to the last bit but rounding; the drawing's own network gets the gradient of the
answer. Codes that were read while drawing stay what they were: the gradient goes through the decision of each code,
in the step that took it, not through those before it. How many steps carry gradient in the paper is not published.
"""
from collections.abc import Sequence

import torch
from torch import Tensor

from diptych.alignment.policy import Trajectory, recall
from diptych.document import Document
from diptych.objectives import next_token
from diptych.objectives.decisions import Decision, Options
from diptych.parts.interleave import IGNORE
from diptych.parts.trunks import pick
from diptych.systems.base import Sampling, System
from diptych.systems.batch import Batch
from diptych.systems.coded import Coded


def posterior_noise(chosen: Tensor, log_probs: Tensor, generator: torch.Generator) -> Tensor:
    """Gumbel noise (m, V) given that `chosen` (m,) is where log-probs (m, V) plus noise are largest; 0 where a value
    has no probability."""
    uniforms = torch.rand(log_probs.shape, generator=generator, device=generator.device).to(log_probs.device)
    fresh = -(-uniforms.clamp(1e-20, 1 - 1e-7).log()).log()
    known = log_probs.detach().float()
    top = fresh.gather(-1, chosen[:, None])  # the largest of all is a standard Gumbel variable, whichever it is
    # ... and the others are those of their own that stay below it
    below = -torch.logaddexp(-top, -(known + fresh))
    total = below.scatter(-1, chosen[:, None], top)
    return torch.where(known.isfinite(), total - known, 0.0)


def straight_through(chosen: Tensor, log_probs: Tensor, generator: torch.Generator, tau: float = 1.0) -> Tensor:
    """Rows (m, V) that are one-hot at `chosen` (m,), with the gradient of the softmax at temperature `tau`."""
    noise = posterior_noise(chosen, log_probs, generator)
    soft = torch.softmax((log_probs.float() + noise) / tau, -1)
    return torch.nn.functional.one_hot(chosen, log_probs.shape[-1]) + soft - soft.detach()


def rows(decisions: Sequence[Decision], generator: torch.Generator, tau: float = 1.0) -> Tensor:
    """A drawing's codes as rows (n, V), cell by cell."""
    kept = [d.options for d in decisions if d.options is not None and d.kind in ("code", "masked code")]
    if not kept:
        raise ValueError("expected a drawing of codes to learn through, got none; fix: a system that draws codes one "
                         "by one or masked")
    whole = Options(*(torch.cat([getattr(o, name) for o in kept]) for name in ("chosen", "log_probs")))
    made = straight_through(whole.chosen, whole.log_probs, generator, tau)
    if kept[0].cells is None:
        return made
    return made[torch.cat([o.cells for o in kept if o.cells is not None]).argsort()]


def answer_loss(system: System, drawings: Sequence[Trajectory], questions: Sequence[Document], sampling: Sampling,
                seed: int, tau: float = 1.0) -> Tensor:
    """Mean negative log-likelihood of the words of true answers. `questions`: about the drawing of the same number,
    with their answers as targets."""
    reader = _readable(system, questions[0])
    generator = torch.Generator(system.device).manual_seed(seed)
    drawn = torch.cat([rows(own, generator, tau) for own in recall(system, drawings, sampling, options=True)])
    table = reader.code_tokens(torch.arange(drawn.shape[-1], device=drawn.device))
    written = [reader.write(q) for q in questions]
    page = Batch.of(written, [[n] for n in range(len(written))]).to(system.device).page
    hidden, _ = reader.think(page, None, drawn.to(table.dtype) @ table)
    labels = page.labels.flatten()
    words = torch.nonzero(labels != IGNORE).squeeze(1)
    return next_token.cross_entropy(reader.head(pick(hidden, page.tokens, words)), labels[words]).mean()


def _readable(system: System, question: Document) -> Coded:
    """The system, if it reads the drawing in a question by the codes that it drew."""
    if isinstance(system, Coded) and not system.code_shape and type(system).read_page is Coded.read_page:
        writer, pictures, views = system.write(question)
        if len(pictures) == len(writer.codes) == 1 and not views:
            return system
    raise ValueError(f"expected a system that reads pictures by the codes that it draws, got {type(system).__name__}; "
                     "fix: show-o, emu3 and their like, or method=grpo, which asks nothing of the system")
