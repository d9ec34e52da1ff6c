"""The rule of vmap: a mapped dimension becomes a batch dimension of the rows."""

from collections.abc import Callable

import torch
from torch import Tensor


def to_rows(
    function: Callable, size: int, in_dims: tuple[int | None, ...], arrays: tuple[Tensor | None, ...], *, weight: int
) -> tuple[tuple, tuple]:
    """function's outputs over mapped arrays, and where their mapped dimension is: one call, mapped dimension first.

    Mapped class weights (the array at position `weight`) take a call each, since a launch has one vector of them.
    """
    if in_dims[weight] is not None and arrays[weight] is not None:
        parts = [
            function(*(_own(array, dim, i) for array, dim in zip(arrays, in_dims, strict=True))) for i in range(size)
        ]
        if not parts:
            none = function(*(_own(array, dim, None) for array, dim in zip(arrays, in_dims, strict=True)))
            parts = [none]
            stacked = [None if column[0] is None else column[0][None][:0] for column in zip(*parts, strict=True)]
        else:
            stacked = [None if column[0] is None else torch.stack(column) for column in zip(*parts, strict=True)]
    else:
        mapped = [
            array if i == weight or array is None else _first(array, dim, size)
            for i, (array, dim) in enumerate(zip(arrays, in_dims, strict=True))
        ]
        stacked = function(*mapped)
    return tuple(stacked), tuple(None if out is None or out.ndim == 0 else 0 for out in stacked)


def _first(array: Tensor, dim: int | None, size: int) -> Tensor:
    return array.expand(size, *array.shape) if dim is None else array.movedim(dim, 0)


def _own(array: Tensor | None, dim: int | None, index: int | None) -> Tensor | None:
    if array is None or dim is None:
        return array
    if index is None:
        moved = array.movedim(dim, 0)
        return array.new_zeros(moved.shape[1:])
    return array.select(dim, index)
