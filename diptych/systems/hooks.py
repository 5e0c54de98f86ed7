"""Changing what comes into a network, from outside: inside `altering`, what a system makes of pictures or codes passes
through a function. Compiled decoding stands aside meanwhile."""
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from diptych.systems.base import System

# features of pictures, states of codes, states of latents
POINTS = ("see", "code_tokens", "latent_tokens")


@contextmanager
def altering(system: System, point: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """`change` gets the states (n, width) of all features, codes or latents of a call, in order, and gives what enters
    the network in their place."""
    if point not in POINTS or not hasattr(type(system), point):
        raise ValueError(f"expected a system with one of {', '.join(POINTS)}, got {point!r} of "
                         f"{type(system).__name__}")
    if point in vars(system):
        raise ValueError(f"expected one change of {point!r} at a time, got one inside another; fix: join the functions")
    plain = getattr(system, point)
    object.__setattr__(system, point, lambda *given: change(plain(*given)))
    try:
        yield
    finally:
        object.__delattr__(system, point)


def altered(system: System) -> bool:
    """Whether something is being changed."""
    return any(point in vars(system) for point in POINTS)
