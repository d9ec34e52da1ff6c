"""Row operations a slice of the rows at a time.

Logits whose rows no kernel can reach in place are copied, a slice small enough for the cache, and the kernels run on
the copy. On CPUs the plain operations' temporaries stay in the cache that way. No whole copy is made, and the gradient
has the layout of the logits.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from torch_api import layout, tracing
from torch_api.rows import Inputs, RowSpec, Stats, Upstream

SLICE_BYTES = 2**24  # of a GPU: from 2**23 to 2**26 differ by an eighth at most (H200)
# From the number of programs and of their steps, not timed.
FEW_NEIGHBOURS, FEW_ROWS, MANY_CLASSES = 16, 2048, 1024
SLICE_ELEMENTS = 2**20  # of a CPU: plain operations take four times as long on 2**24 bf16 logits at once


def is_scattered(inputs: Inputs) -> bool:
    """Whether no kernel reaches the rows of logits [*batch, V] in place, or only an element at a time.

    A single row is copied elsewhere.
    """
    logits, target, _ = inputs
    if logits.ndim == 1 or logits.is_contiguous():
        return False
    levels = layout.row_levels(logits.shape, logits.stride())
    if levels is None:
        return True
    n_classes = logits.shape[-1]
    n_rows = logits.numel() // n_classes
    # A tile's neighbours are rows of one group, or classes. Few leave it empty; few tiles leave multiprocessors idle.
    elsewhere = 0 < (levels.outer_stride or 0) < min(levels.stride, levels.class_stride)
    few = (levels.rows_inner or n_rows) < FEW_NEIGHBOURS or (n_rows < FEW_ROWS and n_classes > MANY_CLASSES)
    return levels.class_stride != 1 and (elsewhere or few or target.is_floating_point())


def overflows_cache(inputs: Inputs) -> bool:
    """Whether plain operations on a CPU would leave its cache; tracers and transforms see whole arrays."""
    logits = inputs.logits
    return logits.is_cpu and logits.ndim > 1 and logits.numel() > SLICE_ELEMENTS and tracing.is_eager(*inputs)


def stats(operation: Callable[..., Stats], inputs: Inputs, spec: RowSpec, *, with_argmax: bool) -> Stats:
    """`launch.stats` of slices."""
    parts = [operation(_part(inputs, own, spec), spec, with_argmax=with_argmax) for own in _slices(inputs.logits, spec)]
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
    for own in _slices(inputs.logits, spec):
        rows = Upstream(*(None if x is None else own(x) for x in upstream))  # pyright: ignore[reportArgumentType]
        part = _part(inputs, own, spec)
        found = operation(part, rows, spec, with_dtarget=with_dtarget, donate=_is_copied(spec))
        own(dlogits).copy_(found[0])
        if dtarget is not None and found[1] is not None:
            own(dtarget).copy_(found[1])
        del part, found  # before the next slice is copied
    return dlogits, dtarget


def fused(
    operation: Callable[..., tuple[Stats, Tensor]], inputs: Inputs, denominator: Tensor, spec: RowSpec, *, donate: bool
) -> tuple[Stats, Tensor]:
    """`launch.fused` of slices."""
    dlogits = inputs.logits if donate else torch.empty_like(inputs.logits)
    parts = []
    for own in _slices(inputs.logits, spec):
        part = _part(inputs, own, spec)
        out, gradient = operation(part, denominator, spec, donate=_is_copied(spec))
        own(dlogits).copy_(gradient)
        del part, gradient  # before the next slice is copied
        parts.append(out)
    return _joined(inputs, parts), dlogits


def _slices(logits: Tensor, spec: RowSpec) -> Iterator[Callable[[Tensor], Tensor]]:
    """What takes a slice's part of an array with the batch dimensions, along the longest of them."""
    dim = _longest(logits)
    size = logits.shape[dim]
    elements = SLICE_BYTES // logits.element_size() if _is_copied(spec) else SLICE_ELEMENTS
    step = max(1, elements * size // logits.numel())
    for start in range(0, size, step):
        length = min(step, size - start)
        yield lambda array, start=start, length=length: array.narrow(dim, start, length)


def _longest(logits: Tensor) -> int:
    *batch, _ = logits.shape
    return max(range(len(batch)), key=batch.__getitem__)


def _is_copied(spec: RowSpec) -> bool:
    return spec.implementation == "triton"


def _part(inputs: Inputs, own: Callable[[Tensor], Tensor], spec: RowSpec) -> Inputs:
    logits = own(inputs.logits)
    if _is_copied(spec):
        # Even where the slice is contiguous: the gradient overwrites it.
        logits = logits.clone(memory_format=torch.contiguous_format)
    return Inputs(logits, own(inputs.target), inputs.weight)


def _joined(inputs: Inputs, parts: list[Stats]) -> Stats:
    dim = _longest(inputs.logits)
    loss, lse, target_sum, predicted = zip(*parts, strict=True)
    joined = None if predicted[0] is None else torch.cat(predicted, dim)
    return Stats(torch.cat(loss, dim), torch.cat(lse, dim), torch.cat(target_sum, dim), joined)
