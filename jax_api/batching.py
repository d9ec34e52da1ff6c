"""vmap: the mapped axis becomes one more leading axis of the same launch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap


def over_leading_axes(function: Callable) -> Callable:
    """A function of (*rows, weight) for vmap: one launch, unless the weights are mapped."""
    mapped = custom_vmap(function)

    @mapped.def_vmap
    def fold(axis_size, in_batched, *arguments):
        *rows, weight = arguments
        if weight is not None and in_batched[-1]:
            out = _one_by_one(mapped, axis_size, in_batched, arguments)
        else:
            rows = [
                array if array is None or batched else jnp.broadcast_to(array, (axis_size, *array.shape))
                for array, batched in zip(rows, in_batched, strict=False)
            ]
            out = mapped(*rows, weight)
        return out, jax.tree.map(lambda _: True, out)

    return mapped


def _one_by_one(function: Callable, axis_size: int, in_batched, arguments):
    # A launch has one vector of class weights.
    def own(i):
        return function(*(array[i] if batched else array for array, batched in zip(arguments, in_batched, strict=True)))

    if axis_size:
        return lax.map(own, jnp.arange(axis_size))
    single = [
        jax.ShapeDtypeStruct(array.shape[1:], array.dtype) if batched else array
        for array, batched in zip(arguments, in_batched, strict=True)
    ]
    return jax.tree.map(lambda shape: jnp.zeros((0, *shape.shape), shape.dtype), jax.eval_shape(function, *single))
