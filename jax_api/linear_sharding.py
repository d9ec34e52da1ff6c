"""A linear head on arrays that may be sharded over a mesh, by rows, by vocabulary or both, as in `jax_api.sharding`.

Every device runs the loops of `jax_api.linear_chunks` on its own rows and classes. What moves are two row vectors a
chunk between slices of the vocabulary and, once, after the loop, the sums of the gradients: of weight and bias over
devices with other rows, of hidden over devices with other classes.

Arrays are described by their factors: "rows" (every axis of the rows), "width" and "classes". Under `jax.vmap` the
mapped elements run one after the other, as chunks do.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import sequential_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_api import linear_chunks, sharding
from jax_api.launch import vary, varying_axes
from jax_api.linear_chunks import Gradients, Head, LinearStatic, Wanted
from jax_api.reference import Upstream, is_soft
from jax_api.static import Stats


def stats(static: LinearStatic, head: Head) -> Stats:
    """Statistics of every row."""
    predicted = "rows" if static.rows.with_argmax else None
    return _on_any_mesh(linear_chunks.stats, ROW_FACTORS._replace(predicted=predicted), static, head)


def fused(static: LinearStatic, wanted: Wanted, head: Head, denominator: Array) -> tuple[Stats, Gradients]:
    """Statistics of every row, and the gradients of Σ loss / denominator, a scalar."""

    def body(static: LinearStatic, head: Head, denominator: Array):
        return linear_chunks.fused(static, wanted, head, denominator)

    factors = (ROW_FACTORS, _gradient_factors(static, wanted, head))
    return _on_any_mesh(body, factors, static, head, jnp.broadcast_to(denominator, head.hidden.shape[:-1]))


def grad(static: LinearStatic, wanted: Wanted, head: Head, upstream: Upstream) -> Gradients:
    """Gradients for any upstream gradients."""

    def body(static: LinearStatic, head: Head, upstream: Upstream):
        return linear_chunks.grad(static, wanted, head, upstream)

    return _on_any_mesh(body, _gradient_factors(static, wanted, head), static, head, upstream)


ROW_FACTORS: Any = Stats(*("rows",) * 3, None)  # pyright: ignore


class Axes(NamedTuple):
    """The mesh axes of the axes of the rows, and those of the classes."""

    rows: tuple[sharding.Names, ...]
    classes: sharding.Names

    def spec(self, factors: str) -> PartitionSpec:
        """How an array with these factors is sharded."""
        each = {"rows": self.rows, "width": (None,), "classes": (self.classes,)}
        return PartitionSpec(*(entry or None for factor in factors.split() for entry in each[factor]))


def aligned(static: LinearStatic, head: Head) -> Head:
    """Explicit mesh axes: a head whose arrays are sharded as one, so that every gradient has the type of its array."""
    mesh = sharding.mesh_of(head.hidden)
    if AxisType.Explicit not in mesh.axis_types:
        return head
    return _resharded(mesh, _explicit_axes(static, head), head, _head_factors(static, head))


def _on_any_mesh(body: Callable, result_factors: Any, static: LinearStatic, *arrays):
    def run(head: Head, *others):
        rows, mesh, kind = sharding.how_to_run(static.rows, head.hidden)
        known = replace(static, rows=rows)
        factors = (_head_factors(static, head), *jax.tree.map(lambda _: "rows", others))
        if kind == AxisType.Explicit:
            return _explicit(body, known, mesh, factors, result_factors, head, *others)
        if kind == AxisType.Auto:
            return _partitioned(body, known, mesh, factors, result_factors, head, *others)
        return body(known, head, *others)

    return sequential_vmap(run)(*arrays)


def _local(body: Callable, static: LinearStatic, axes: Axes, head: Head, *others):
    """body on a device's own arrays."""
    names = tuple(name for entry in axes.rows for name in entry)
    classes = static.rows.axis_name + axes.classes
    rows = replace(static.rows, axis_name=classes)
    local = replace(static, rows=rows, summed_hidden=axes.classes, summed_weight=names)
    return body(local, varied(head), *others)


def varied(head: Head, *others: Array) -> Head:
    """The arrays varying over the same mesh axes; whole rows' labels over theirs alone."""
    axes = varying_axes(*jax.tree.leaves((head, others)))
    alike = jax.tree.map(lambda x: vary(x, axes), head)
    return alike if is_soft(head.target) else alike._replace(target=head.target)


def _explicit(body: Callable, static: LinearStatic, mesh: Any, factors: Any, result_factors: Any, *arrays):
    axes = _explicit_axes(static, arrays[0])
    # All of them, also where nothing is sharded: the loops' arrays have no explicit types.
    explicit = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    specs, result_specs = jax.tree.map(axes.spec, (factors, result_factors))
    local = sharding.over_axes(partial(_local, body, static, axes), mesh, explicit, specs, result_specs)
    return local(*_resharded(mesh, axes, arrays, factors))


def _explicit_axes(static: LinearStatic, head: Head) -> Axes:
    """Rows as those of hidden or, where it is not sharded, of the labels; classes as those of weight."""
    *rows, _ = sharding.joint_spec(head.hidden, head.target)
    return _axes(static, rows, jax.typeof(head.weight).sharding.spec)


def _axes(static: LinearStatic, rows: Iterable, weight_spec: Iterable) -> Axes:
    """From entries of PartitionSpecs. What shards rows shards no classes."""
    rows = tuple(sharding.names_of(entry) for entry in rows)
    taken = {name for entry in rows for name in entry}
    classes = sharding.names_of((*weight_spec, None, None)[static.class_axis])
    return Axes(rows, tuple(name for name in classes if name not in taken))


def _resharded(mesh: Any, axes: Axes, arrays: Any, names: Any) -> Any:
    def placed(x, factors):
        return jax.sharding.reshard(x, NamedSharding(mesh, axes.spec(factors)))

    return jax.tree.map(placed, arrays, names)


def _partitioned(body: Callable, static: LinearStatic, mesh: Any, factors: Any, result_factors: Any, *arrays):
    head, *others = arrays
    rows = " ".join(f"row{i}" for i in range(head.hidden.ndim - 1))

    def partition(mesh, operands, _):
        mesh, axes = _divisible_axes(static, mesh, operands[0])
        placed = jax.tree.map(lambda own: NamedSharding(mesh, axes.spec(own)), (factors, result_factors))
        return mesh, partial(_local, body, static, axes), placed[1], placed[0]

    def rule(*_):
        sides = (", ".join(jax.tree.leaves(side)) for side in (factors, result_factors))
        return " -> ".join(sides).replace("rows", rows)

    operation = custom_partitioning(partial(body, static))
    operation.def_partition(partition, sharding_rule=rule)
    return operation(head._replace(target=sharding.tell(mesh, head.target)), *others)


def _divisible_axes(static: LinearStatic, mesh: Any, head: Any) -> tuple[Any, Axes]:
    """The axes of rows and classes, without those that do not divide them and those of the rows among the classes'."""
    shape = (*head.hidden.shape[:-1], head.weight.shape[static.class_axis])
    if mesh.empty:
        logits = jax.ShapeDtypeStruct(shape, static.dtype, sharding=head.hidden.sharding)
    else:
        rows = (*head.hidden.sharding.spec, *[None] * len(shape))[: len(shape) - 1]
        spec = _axes(static, rows, head.weight.sharding.spec).spec("rows classes")
        logits = jax.ShapeDtypeStruct(shape, static.dtype, sharding=NamedSharding(mesh, spec))
    mesh, (*rows, classes) = sharding.divisible(mesh, logits)
    return mesh, Axes(tuple(sharding.names_of(entry) for entry in rows), sharding.names_of(classes))


def _head_factors(static: LinearStatic, head: Head) -> Head:
    target = "rows classes" if is_soft(head.target) else "rows"
    factors = ("rows width", _weight_factors(static), "classes", target, "classes")
    return Head(*(None if x is None else own for x, own in zip(head, factors, strict=True)))  # pyright: ignore


def _gradient_factors(static: LinearStatic, wanted: Wanted, head: Head) -> Gradients:
    """As `linear_chunks` returns them."""
    flags = (wanted.hidden, wanted.weight, wanted.bias and head.bias is not None, wanted.target)
    factors = ("rows width", _weight_factors(static), "classes", "rows classes")
    return Gradients(*(own if want else None for want, own in zip(flags, factors, strict=True)))  # pyright: ignore


def _weight_factors(static: LinearStatic) -> str:
    return "width classes" if static.class_axis else "classes width"
