"""Logits whose rows no kernel can reach in place, as those of (N, C, d1), a slice of them at a time.

A slice is copied with its classes side by side, small enough for the cache, and the kernels run on the copy. No whole
copy is made, and the gradient has the layout of the logits.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from torch_api import layout
from torch_api.rows import Inputs, RowSpec, Stats, Upstream

SLICE_BYTES = 2**24


def is_scattered(inputs: Inputs) -> bool:
    """Whether logits [*batch, V] are laid out like that; a single row is not: it is copied."""
    logits, target, _ = inputs
    if logits.ndim == 1 or logits.is_contiguous():
        return False
    levels = layout.row_levels(logits.shape, logits.stride())
    return levels is None or (levels.class_stride != 1 and target.is_floating_point())


def stats(operation: Callable[..., Stats], inputs: Inputs, spec: RowSpec, *, with_argmax: bool) -> Stats:
    """`launch.stats` of slices."""
    parts = [operation(_copied(inputs, own), spec, with_argmax=with_argmax) for own in _slices(inputs.logits)]
    return _joined(inputs, parts)


def grad(
    operation: Callable[..., tuple[Tensor, Tensor | None]],
    inputs: Inputs,
    upstream: Upstream,
    spec: RowSpec,
    *,
    with_dtarget: bool,
    donate: bool,
) -> tuple[Tensor, Tensor | None]:
    """`launch.grad` of slices."""
    dlogits = inputs.logits if donate else torch.empty_like(inputs.logits)
    dtarget = torch.empty_like(inputs.target) if with_dtarget else None
    for own in _slices(inputs.logits):
        rows = Upstream(*(None if x is None else own(x) for x in upstream))  # pyright: ignore[reportArgumentType]
        found = operation(_copied(inputs, own), rows, spec, with_dtarget=with_dtarget, donate=True)
        own(dlogits).copy_(found[0])
        if dtarget is not None and found[1] is not None:
            own(dtarget).copy_(found[1])
        del found  # before the next slice is copied
    return dlogits, dtarget


def fused(
    operation: Callable[..., tuple[Stats, Tensor]], inputs: Inputs, denominator: Tensor, spec: RowSpec, *, donate: bool
) -> tuple[Stats, Tensor]:
    """`launch.fused` of slices."""
    dlogits = inputs.logits if donate else torch.empty_like(inputs.logits)
    parts = []
    for own in _slices(inputs.logits):
        out, gradient = operation(_copied(inputs, own), denominator, spec, donate=True)
        own(dlogits).copy_(gradient)
        del gradient  # before the next slice is copied
        parts.append(out)
    return _joined(inputs, parts), dlogits


def _slices(logits: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
    """What takes a slice's part of an array with the batch dimensions, along the longest of them."""
    dim = _longest(logits)
    size = logits.shape[dim]
    step = max(1, SLICE_BYTES * size // (logits.numel() * logits.element_size()))
    for start in range(0, size, step):
        length = min(step, size - start)
        yield lambda array, start=start, length=length: array.narrow(dim, start, length)


def _longest(logits: Tensor) -> int:
    *batch, _ = logits.shape
    return max(range(len(batch)), key=batch.__getitem__)


def _copied(inputs: Inputs, own: Callable[[Tensor], Tensor]) -> Inputs:
    # A clone even where the slice is contiguous: the gradient overwrites it.
    logits = own(inputs.logits).clone(memory_format=torch.contiguous_format)
    return Inputs(logits, own(inputs.target), inputs.weight)


def _joined(inputs: Inputs, parts: list[Stats]) -> Stats:
    dim = _longest(inputs.logits)
    loss, lse, target_sum, predicted = zip(*parts, strict=True)
    joined = None if predicted[0] is None else torch.cat(predicted, dim)
    return Stats(torch.cat(loss, dim), torch.cat(lse, dim), torch.cat(target_sum, dim), joined)
