"""What the modules of this front end pass each other: the arrays of rows, and what all rows of a call have in common.

logits [*batch, V], target [*batch] (class indices) or [*batch, V], row vectors [*batch], weight [V].
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ce_kernels import Options

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class RowSpec:
    """The options of all rows, and who computes. A row may be a slice of total_classes that starts at vocab_start."""

    options: Options
    implementation: str
    vocab_start: int | None = None
    total_classes: int | None = None

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Once: every launch finds its plan by it. Of numbers alone, which hash alike in every process.
        return hash((self.options, self.vocab_start, self.total_classes))


class Inputs(NamedTuple):
    """Logits, targets and class weights."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None


class Stats(NamedTuple):
    """loss, lse, s = Σq and the argmax (None unless asked for) of every row."""

    loss: Tensor
    lse: Tensor
    target_sum: Tensor
    predicted: Tensor | None = None


class Upstream(NamedTuple):
    """What a gradient is made from beside the inputs: lse and s, and the gradients that come in for loss and lse."""

    lse: Tensor
    target_sum: Tensor
    dloss: Tensor
    dlse: Tensor | None


def or_zeros(dloss: Tensor | None, lse: Tensor) -> Tensor:
    """The upstream gradient of every row's loss: where none came in, zeros that take no memory."""
    return torch.zeros((), dtype=lse.dtype, device=lse.device).expand(lse.shape) if dloss is None else dloss


class Reducing(NamedTuple):
    """How rows become the loss, and whose they are."""

    reduction: str
    denominator: "float | Tensor | None" = None
    donate: bool = False
    process_group: "ProcessGroup | None" = None
