"""Which rows a kernel can read in place, and how a gradient is laid out: decided from shapes and strides alone."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Levels(NamedTuple):
    """Row i starts at i·stride; with rows_inner at (i // rows_inner)·outer_stride + (i % rows_inner)·stride.

    From class to class it is class_stride.
    """

    stride: int
    rows_inner: int | None = None
    outer_stride: int | None = None
    class_stride: int = 1


@lru_cache(maxsize=4096)
def row_levels(shape: tuple[int, ...], strides: tuple[int, ...]) -> Levels | None:
    """How the rows of an array [*batch, V] are reached in place; None: not at all (three levels)."""
    n_classes = shape[-1]
    if 0 in shape:
        return Levels(n_classes)
    class_stride = strides[-1] if n_classes > 1 else 1
    levels: list[list[int]] = []
    for size, stride in zip(shape[:-1], strides[:-1], strict=True):
        if size == 1:
            continue
        if levels and levels[-1][1] == size * stride:
            levels[-1] = [levels[-1][0] * size, stride]
        else:
            levels.append([size, stride])
    if not levels:
        # One row may claim any stride, which would compile the same kernel again.
        return Levels(n_classes, class_stride=class_stride)
    if len(levels) == 1:
        return Levels(levels[0][1], class_stride=class_stride)
    if len(levels) == 2:
        (_, outer_stride), (rows_inner, stride) = levels
        return Levels(stride, rows_inner, outer_stride, class_stride)
    return None


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of an array that PyTorch allocates."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= max(size, 1)
    return tuple(strides)


@lru_cache(maxsize=4096)
def gradient_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a gradient: it fills its memory, in the order of its logits; contiguous where these overlap."""
    contiguous = contiguous_strides(shape)
    # The stride of a single element says nothing.
    if 0 in shape or all(a == b or size == 1 for a, b, size in zip(strides, contiguous, shape, strict=True)):
        return contiguous
    if any(stride == 0 and size > 1 for size, stride in zip(shape, strides, strict=True)):
        return contiguous
    found, step = list(strides), 1
    for dim in sorted((dim for dim, size in enumerate(shape) if size > 1), key=strides.__getitem__):
        found[dim] = step
        step *= shape[dim]
    # The kernels reach both in the same levels.
    of_logits, levels = row_levels(shape, strides), row_levels(shape, tuple(found))
    if of_logits is not None and (levels is None or levels.rows_inner not in (None, of_logits.rows_inner)):
        return contiguous
    return tuple(found)


def gradient_levels(shape: tuple[int, ...], strides: tuple[int, ...]) -> Levels:
    """How a kernel reaches the rows of that gradient, in the levels of its logits."""
    of_logits = row_levels(shape, strides)
    found = row_levels(shape, gradient_strides(shape, strides))
    assert of_logits is not None
    assert found is not None
    if of_logits.rows_inner is not None and found.rows_inner is None:
        outer_stride = of_logits.rows_inner * found.stride
        return Levels(found.stride, of_logits.rows_inner, outer_stride, found.class_stride)
    return found


def overlaps(array: Tensor) -> bool:
    """Whether elements may share memory, as those of an expanded array and the windows of `unfold` do."""
    extent = 1
    for stride, size in sorted(zip(array.stride(), array.shape, strict=True)):
        if size > 1:
            if stride < extent:
                return True
            extent += (size - 1) * stride
    return False


def laid_out(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient with the strides of `torch.empty_like`."""
    # A gradient fills its memory: with the strides of its like, so does that, and `empty_like` keeps them.
    if gradient.stride() == like.stride() or gradient.stride() == torch.empty_like(like, device="meta").stride():
        return gradient
    return torch.empty_like(like).copy_(gradient)


def as_stored(values: Tensor) -> Tensor:
    """Values as a kernel reads them: with PyTorch's lazy signs (of conjugates) and lazy zeros in memory."""
    return values.clone() if values._is_zerotensor() else values.resolve_neg()


def as_vector(rows: Tensor | None) -> Tensor | None:
    """Row values [*batch] as a vector whose stride is 1, or 0 for one value: every other stride would be compiled."""
    if rows is None:
        return None
    rows = as_stored(rows)
    if not rows.is_contiguous():
        vector = rows.reshape(-1)
        return vector if vector.stride(0) == 0 else vector.contiguous()
    return rows.view(-1)
