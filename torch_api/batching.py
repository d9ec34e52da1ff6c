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
        stacked = one_by_one(function, size, in_dims, arrays)
    else:
        mapped = [
            array if i == weight or array is None else _first(array, dim, size)
            for i, (array, dim) in enumerate(zip(arrays, in_dims, strict=True))
        ]
        stacked = function(*mapped)
    return tuple(stacked), tuple(None if out is None else 0 for out in stacked)


def one_by_one(function: Callable, size: int, in_dims: tuple, arguments: tuple) -> list[Tensor | None]:
    """function's outputs, stacked, over arguments of which those are mapped that have a dimension: a call each."""

    def own(i: int) -> tuple:
        pairs = zip(arguments, in_dims, strict=True)
        return function(*(x.select(dim, i) if isinstance(dim, int) else x for x, dim in pairs))

    if size:
        return [None if outs[0] is None else torch.stack(outs) for outs in zip(*map(own, range(size)), strict=True)]
    # Of nothing, only the shapes are known: those of one made up.
    made_up = tuple(
        x.new_zeros([n if i != dim else 1 for i, n in enumerate(x.shape)]) if isinstance(dim, int) else x
        for x, dim in zip(arguments, in_dims, strict=True)
    )
    return [None if out is None else out[:0] for out in one_by_one(function, 1, in_dims, made_up)]


def _first(array: Tensor, dim: int | None, size: int) -> Tensor:
    return array.expand(size, *array.shape) if dim is None else array.movedim(dim, 0)
