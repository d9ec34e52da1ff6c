"""What travels together through the layers: the static problem, a slice of the vocabulary, statistics."""

from dataclasses import dataclass
from typing import NamedTuple

from jax import Array

from ce_kernels import Options


@dataclass(frozen=True)
class Static:
    """What is known at trace time. axis_name: mesh axes over which the logits are slices of the vocabulary."""

    options: Options
    implementation: str | None
    with_argmax: bool = False
    axis_name: tuple[str, ...] = ()


class Part(NamedTuple):
    """Which part of the vocabulary local logits are: their first class (integers [1]; None: 0), and V of the whole."""

    start: Array | None
    total: int


class Stats(NamedTuple):
    """loss, lse, s = Σq and the argmax (None unless asked for) of every row."""

    loss: Array
    lse: Array
    target_sum: Array
    predicted: Array | None
