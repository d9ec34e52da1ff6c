"""The chunk loops of a linear head: a `lax.scan` over chunks of rows, in which a chunk of logits lives and dies.

    stats   loss, lse, s (and argmax) of every row                     one matmul
    fused   loss, lse, s and the gradients of Σ loss / denominator     three matmuls
    grad    gradients for any upstream gradients of loss and lse       three matmuls, one for the logits again

Arrays are local: `jax_api.linear_sharding` makes them so. Chunks have equal length, so that the loop's body is compiled
once; the last one ends with the last row and goes over some rows again: their results are written twice, and only the
sums over rows must leave them out the second time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ce_kernels.linear import chunk_rows
from jax_api import slices
from jax_api.launch import vary, varying_axes
from jax_api.reference import Upstream
from jax_api.slices import Names
from jax_api.static import Static, Stats


class Head(NamedTuple):
    """hidden [..., D], weight [D, V] or [V, D], bias [V], target [...] or [..., V], class_weight [V]."""

    hidden: Array
    weight: Array
    bias: Array | None
    target: Array
    class_weight: Array | None


class Gradients(NamedTuple):
    """By hidden, weight, bias and soft targets; None where not wanted."""

    hidden: Array | None = None
    weight: Array | None = None
    bias: Array | None = None
    target: Array | None = None


@dataclass(frozen=True)
class Wanted:
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool
    target: bool


@dataclass(frozen=True)
class LinearStatic:
    """What is known at trace time. class_axis: that of weight; dtype: the logits'.

    summed_hidden, summed_weight: mesh axes over which the gradients of hidden, and of weight and bias, are summed here.
    """

    rows: Static
    class_axis: int
    max_logits_bytes: int
    accumulation: str
    dtype: jnp.dtype
    summed_hidden: Names = ()
    summed_weight: Names = ()


def stats(static: LinearStatic, head: Head) -> Stats:
    """Statistics of every row."""

    def step(out: Stats, chunk: _Chunk) -> Stats:
        found = slices.stats(static.rows, static.rows.axis_name, chunk.logits, chunk.target, chunk.class_weight)
        return jax.tree.map(chunk.written, out, found)

    rows = _zero_rows(static, head)
    predicted = rows.astype(jnp.int32) if static.rows.with_argmax else None
    return _in_shape_of(head, _over_chunks(static, head, Stats(rows, rows, rows, predicted), step))


def fused(static: LinearStatic, wanted: Wanted, head: Head, denominator: Array) -> tuple[Stats, Gradients]:
    """Statistics of every row, and the gradients of Σ loss / denominator, given for every row."""
    denominator = denominator.reshape(-1)

    def step(carry, chunk: _Chunk):
        out, sums = carry
        arrays = (chunk.logits, chunk.target, chunk.read(denominator), chunk.class_weight)
        found, dlogits = slices.fused(static.rows, static.rows.axis_name, *arrays)
        return jax.tree.map(chunk.written, out, found), _added(static, sums, chunk, dlogits)

    rows = _zero_rows(static, head)
    carry = (Stats(rows, rows, rows, None), _zero_gradients(static, wanted, head))
    out, sums = _over_chunks(static, head, carry, step)
    return _in_shape_of(head, out), _finished(static, head, sums)


def grad(static: LinearStatic, wanted: Wanted, head: Head, upstream: Upstream) -> Gradients:
    """Gradients for any upstream gradients."""
    upstream = jax.tree.map(lambda x: x.reshape(-1), upstream)

    def step(sums: Gradients, chunk: _Chunk) -> Gradients:
        own = jax.tree.map(chunk.read, upstream)
        names = static.rows.axis_name
        dlogits, dtarget = slices.grad(static.rows, names, chunk.logits, chunk.target, *own, chunk.class_weight)
        sums = _added(static, sums, chunk, dlogits)
        if sums.target is None or dtarget is None:
            return sums
        return sums._replace(target=chunk.written(sums.target, dtarget))

    sums = _over_chunks(static, head, _zero_gradients(static, wanted, head), step)
    return _finished(static, head, sums)


def logits_of(static: LinearStatic, hidden: Array, weight: Array, bias: Array | None) -> Array:
    """hidden @ weight + bias in the logits' dtype, as an unfused head computes them."""
    rows = hidden.ndim - 1
    logits = _matmul(hidden.astype(static.dtype), weight.astype(static.dtype), rows, 1 - static.class_axis)
    return logits if bias is None else logits + bias.astype(static.dtype)


@dataclass(frozen=True)
class _Chunk:
    """Rows from `start` on; `fresh` are those that no chunk before has seen (None: all); weight is that of all."""

    start: Array | int
    fresh: Array | None
    hidden: Array
    weight: Array
    logits: Array
    target: Array
    class_weight: Array | None

    def read(self, array: Array) -> Array:
        """The chunk's rows of an array of all rows."""
        return lax.dynamic_slice_in_dim(array, self.start, self.logits.shape[0])

    def written(self, array: Array, rows: Array) -> Array:
        """The array of all rows with this chunk's."""
        return lax.dynamic_update_slice_in_dim(array, rows.astype(array.dtype), self.start, axis=0)


def _over_chunks[Carry](
    static: LinearStatic, head: Head, carry: Carry, step: Callable[[Carry, _Chunk], Carry]
) -> Carry:
    n_rows, n_classes = math.prod(head.hidden.shape[:-1]), head.weight.shape[static.class_axis]
    if n_rows == 0:
        return carry
    rows = chunk_rows(n_rows, n_classes, static.dtype.itemsize, static.max_logits_bytes, equal=True)
    count = -(-n_rows // rows)
    hidden = head.hidden.reshape(n_rows, -1).astype(static.dtype)
    target = head.target.reshape(n_rows, *head.target.shape[head.hidden.ndim - 1 :])
    weight = head.weight.astype(static.dtype)

    def body(carry, i):
        start = jnp.minimum(i * rows, n_rows - rows)
        part = partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=rows)
        fresh = None if count * rows == n_rows else start + jnp.arange(rows) >= i * rows
        logits = logits_of(static, part(hidden), weight, head.bias)
        chunk = _Chunk(start, fresh, part(hidden), weight, logits, part(target), head.class_weight)
        return step(carry, chunk), None

    if count == 1:
        return body(carry, 0)[0]
    return lax.scan(body, carry, jnp.arange(count))[0]


def _zero_rows(static: LinearStatic, head: Head) -> Array:
    # Statistics are those of whole rows: slices of the vocabulary have them in common.
    zeros = jnp.zeros(math.prod(head.hidden.shape[:-1]), jnp.promote_types(static.dtype, jnp.float32))
    return vary(zeros, varying_axes(head.hidden) - set(static.rows.axis_name))


def _in_shape_of(head: Head, out: Stats) -> Stats:
    return jax.tree.map(lambda x: x.reshape(head.hidden.shape[:-1]), out)


def _zero_gradients(static: LinearStatic, wanted: Wanted, head: Head) -> Gradients:
    wide = jnp.promote_types(head.weight.dtype, jnp.float32)
    # Sums are as wide as the parameter, and float32 at the least, unless rounding every partial sum is allowed.
    narrow = static.accumulation == "parameter" and head.weight.dtype == static.dtype
    n_rows, n_classes = math.prod(head.hidden.shape[:-1]), head.weight.shape[static.class_axis]
    return Gradients(
        hidden=_zeros(head, (n_rows, head.hidden.shape[-1]), head.hidden.dtype) if wanted.hidden else None,
        weight=_zeros(head, head.weight.shape, static.dtype if narrow else wide) if wanted.weight else None,
        bias=_zeros(head, head.bias.shape, wide) if wanted.bias and head.bias is not None else None,
        target=_zeros(head, (n_rows, n_classes), head.target.dtype) if wanted.target else None,
    )


def _zeros(head: Head, shape: tuple[int, ...], dtype) -> Array:
    """Zeros that vary over the mesh axes over which hidden does, as a loop's carry under `jax.shard_map` must."""
    return vary(jnp.zeros(shape, dtype), varying_axes(head.hidden))


def _added(static: LinearStatic, sums: Gradients, chunk: _Chunk, dlogits: Array) -> Gradients:
    """sums with this chunk's dhidden written, and its dweight and dbias added."""
    dhidden, dweight, dbias = sums.hidden, sums.weight, sums.bias
    if dhidden is not None:
        dhidden = chunk.written(dhidden, _matmul(dlogits, chunk.weight, 1, static.class_axis))
    if dweight is not None:
        # Rows seen before count as zeros.
        hidden = chunk.hidden if chunk.fresh is None else jnp.where(chunk.fresh[:, None], chunk.hidden, 0.0)
        a, b = (hidden, dlogits) if static.class_axis else (dlogits, hidden)
        dweight += _matmul(a, b, 0, 0, dweight.dtype)
    if dbias is not None:
        rows = dlogits if chunk.fresh is None else jnp.where(chunk.fresh[:, None], dlogits, 0.0)
        dbias += rows.sum(0, dtype=dbias.dtype)
    return sums._replace(hidden=dhidden, weight=dweight, bias=dbias)


def _finished(static: LinearStatic, head: Head, sums: Gradients) -> Gradients:
    """In the shapes and dtypes of what they are gradients of, summed over what other devices have."""

    def finished(x: Array | None, like: Array | None, names: Names) -> Array | None:
        if x is None or like is None:
            return None
        return (lax.psum(x, names) if names else x).astype(like.dtype).reshape(like.shape)

    return Gradients(
        finished(sums.hidden, head.hidden, static.summed_hidden),
        finished(sums.weight, head.weight, static.summed_weight),
        finished(sums.bias, head.bias, static.summed_weight),
        finished(sums.target, head.target, ()),
    )


def _matmul(a: Array, b: Array, a_axis: int, b_axis: int, dtype=None) -> Array:
    """a and b contracted over one axis each, in dtype (None: theirs)."""
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=dtype or a.dtype)
