"""Row operations on arrays that may be sharded over a mesh, by rows, by vocabulary or both.

    axis_name            inside `jax.shard_map` the arrays are local already
    Explicit mesh axes   the arrays' types say how they are sharded: a shard_map makes them local
    Auto mesh axes       XLA knows it when it partitions the program: custom_partitioning makes them local

In each, every device runs the operation of `jax_api.slices` on its own part; nothing of the logits' size ever moves.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ce_kernels.spec import fail
from jax_api import launch, reference, slices
from jax_api.backend import interpreting
from jax_api.batching import over_leading_axes
from jax_api.reference import Upstream
from jax_api.slices import Names, tracks_varying
from jax_api.static import Static, Stats


def stats(static: Static, logits: Array, target: Array, weight: Array | None) -> Stats:
    """Per-row statistics: one read of the logits."""
    return _operation(slices.stats, static)(logits, target, weight)


def grad(
    static: Static, logits: Array, target: Array, weight: Array | None, upstream: Upstream
) -> tuple[Array, Array | None]:
    """dlogits, and dtarget of soft targets, for upstream gradients of loss and lse: one read, one write."""
    return _operation(slices.grad, static)(logits, target, *upstream, weight)


def fused(
    static: Static, logits: Array, target: Array, weight: Array | None, denominator: Array
) -> tuple[Stats, Array]:
    """Statistics, and dlogits of Σ loss / denominator, given for every row: denominator [...]."""
    return _operation(slices.fused, static)(logits, target, denominator, weight)


@lru_cache
def _operation(body: Callable, static: Static) -> Callable:
    """body on arrays whatever their sharding, and under vmap.

    Jitted and kept, so that a call outside of jit compiles once; inlined inside of it.
    """
    return jax.jit(over_leading_axes(partial(_on_any_mesh, body, static)), inline=True)


def _on_any_mesh(body: Callable, static: Static, *arrays):
    static, mesh, kind = how_to_run(static, arrays[0])
    if kind == AxisType.Explicit:
        return _explicit(partial(body, static), static.axis_name, mesh, *arrays)
    if kind == AxisType.Manual:
        return body(static, static.axis_name, *arrays)
    return _partitioned(partial(body, static), mesh, *arrays)


def how_to_run(static: Static, array: Array) -> tuple[Static, Any, AxisType]:
    """What can run on the mesh around the call, that mesh, and whose part it is to make arrays local; Manual: nobody's.

    ValueError where the kernels are asked for and cannot run.
    """
    mesh = mesh_of(array)
    kinds = set(mesh.axis_types)
    auto = any(kind == AxisType.Auto and size > 1 for kind, size in zip(mesh.axis_types, mesh.axis_sizes, strict=True))
    if auto and kinds != {AxisType.Auto}:
        # custom_partitioning does not work inside a shard_map over some axes of a mesh; plain operations do.
        if static.implementation == "triton":
            fail(
                ValueError,
                f"implementation='triton' where XLA shards some axes of the mesh but not all: {mesh}",
                "mesh axes that are all Auto, or none of them",
                "shard_map over all axes, or implementation=None, which takes plain operations here",
            )
        static = replace(static, implementation="reference")
    if AxisType.Explicit in kinds:
        return static, mesh, AxisType.Explicit
    # Triton's interpreter is a host callback, which custom_partitioning cannot hold.
    callback = static.implementation == "triton" and interpreting()
    return static, mesh, AxisType.Manual if callback or AxisType.Manual in kinds else AxisType.Auto


def mesh_of(array: Array) -> Any:
    """The abstract mesh around the call, else that of the array's type; empty in programs that jit alone shards."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.typeof(array).sharding.mesh if mesh.empty else mesh


# Explicit axes.


def _explicit(body: Callable, names: Names, mesh: Any, *arrays):
    spec = joint_spec(arrays[0], arrays[1])
    used = {name for entry in spec for name in names_of(entry)}
    if not used:
        return body(names, *arrays)
    rank = len(spec)
    *rows, weight = arrays
    specs = jax.tree.map(lambda array: _spec(spec, array.ndim, rank), (*rows, None))
    specs = (*specs[:-1], None if weight is None else PartitionSpec(spec[-1]))
    arrays = jax.tree.map(lambda array, own: jax.sharding.reshard(array, NamedSharding(mesh, own)), arrays, specs)
    shapes = jax.eval_shape(
        partial(body, names), *jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), arrays)
    )
    out_specs = jax.tree.map(lambda shape: _spec(spec, len(shape.shape), rank), shapes)
    return over_axes(partial(body, names + names_of(spec[-1])), mesh, used, specs, out_specs)(*arrays)


def over_axes(body: Callable, mesh: Any, axes: set[str], in_specs: Any, out_specs: Any) -> Callable:
    """body in a shard_map over more axes, inside of another or not."""
    manual = mesh.manual_axes
    checked = not manual or tracks_varying(manual)
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=checked)


def joint_spec(logits: Array, target: Array) -> tuple:
    """How logits [..., V] and target are sharded together: as the logits are, and where those are not, as target is."""
    spec = list(_padded(logits))
    used = {name for entry in spec for name in names_of(entry)}
    for i, entry in enumerate(_padded(target)):
        if spec[i] is None and used.isdisjoint(names_of(entry)):
            spec[i] = entry
            used |= set(names_of(entry))
    return tuple(spec)


def _padded(array: Array) -> tuple:
    spec = tuple(jax.typeof(array).sharding.spec)
    return spec + (None,) * (array.ndim - len(spec))


def names_of(entry: str | Names | None) -> Names:
    """The mesh axes of one entry of a PartitionSpec."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _spec(spec: tuple, rank: int, logits_rank: int) -> PartitionSpec:
    """The logits' spec for an array with their axes, or for one of rows."""
    return PartitionSpec(*spec) if rank == logits_rank else PartitionSpec(*spec[:-1])


# Auto axes.


def _partitioned(body: Callable, mesh: Any, *arrays):
    logits, target, *rest = arrays
    rank = logits.ndim
    weighted = arrays[-1] is not None
    target = tell(mesh, target)

    def partition(mesh, operands, results):
        mesh, spec = divisible(mesh, operands[0])

        def sharding(shape):
            return NamedSharding(mesh, _spec(spec, len(shape.shape), rank))

        shardings = [*jax.tree.map(sharding, operands[:-1])]
        shardings.append(NamedSharding(mesh, PartitionSpec(spec[-1])) if weighted else None)
        return mesh, partial(body, names_of(spec[-1])), jax.tree.map(sharding, results), tuple(shardings)

    def rule(_, operands, results):
        def axes(rank_of_array):
            return " ".join([*(f"row{i}" for i in range(rank - 1)), "classes"][:rank_of_array])

        inputs = [axes(len(operand.shape)) for operand in operands]
        if weighted:
            inputs[-1] = "classes"
        return f"{', '.join(inputs)} -> {', '.join(axes(len(result.shape)) for result in results)}"

    operation = custom_partitioning(partial(body, ()))
    operation.def_partition(partition, sharding_rule=rule)
    return operation(logits, target, *rest)


def tell(mesh: Any, array: Array) -> Array:
    """The array, constrained to nothing: it tells XLA's partitioner what the mesh of `jax.set_mesh` is."""
    if mesh.empty:
        return array
    free = PartitionSpec(*[PartitionSpec.UNCONSTRAINED] * array.ndim)
    return lax.with_sharding_constraint(array, NamedSharding(mesh, free))


def divisible(mesh: Any, logits: Any) -> tuple[Any, tuple]:
    """The mesh, and the logits' spec without the axes that do not divide their dimension: padding is no class."""
    rank = len(logits.shape)
    if mesh.empty:
        # Sharded without any mesh, as by pmap: gathered, which is right and slow.
        return Mesh(list(logits.sharding.device_set), ("device",)), (None,) * rank
    spec = []
    for length, entry in zip(logits.shape, (*logits.sharding.spec, *[None] * rank), strict=False):
        # Without axes of one device, so that a vocabulary on one of them counts as whole.
        names = tuple(name for name in names_of(entry) if mesh.shape[name] > 1)
        divides = length % math.prod(mesh.shape[name] for name in names) == 0
        spec.append(names if names and divides else None)
    return mesh, tuple(spec)


# What the public functions do to their arguments first.


def aligned(
    logits: Array, target: Array, weight: Array | None, names: Names, *others: Array
) -> tuple[Array, Array, Array | None]:
    """The arguments sharded alike, so that every gradient has the type of what it is the gradient of.

    Explicit mesh axes: target and weight take the logits' sharding. Inside a shard_map that tracks varying axes, what
    is differentiated varies over all axes that any argument varies over.
    """
    mesh = mesh_of(logits)
    if AxisType.Explicit in mesh.axis_types:
        spec = joint_spec(logits, target)
        logits, target = (
            jax.sharding.reshard(array, NamedSharding(mesh, _spec(spec, array.ndim, len(spec))))
            for array in (logits, target)
        )
        if weight is not None:
            weight = jax.sharding.reshard(weight, NamedSharding(mesh, PartitionSpec(spec[-1])))
    arrays = [array for array in (logits, target, weight, *others) if array is not None]
    varying = launch.varying_axes(*arrays)
    if names and tracks_varying(names):
        varying |= set(names)
    logits = launch.vary(logits, varying)
    if reference.is_soft(target):
        target = launch.vary(target, varying)
    return logits, target, None if weight is None else launch.vary(weight, varying)


def label_weights(weight: Array, target: Array, names: Names) -> Array:
    """The class weight of every row's label, 0 for labels that are no class."""
    column = target
    if names:
        column = target - (len(weight) * lax.axis_index(names)).astype(target.dtype)
    inside = (column >= 0) & (column < len(weight))
    safe = jnp.where(inside, column, 0)
    if AxisType.Explicit in mesh_of(target).axis_types:
        replicated = jax.sharding.reshard(weight, NamedSharding(mesh_of(target), PartitionSpec(None)))
        found = replicated.at[safe].get(out_sharding=jax.typeof(safe).sharding)
    else:
        found = weight[safe]
    found = jnp.where(inside, found, 0.0)
    return lax.psum(found, names) if names else found
