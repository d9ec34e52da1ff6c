"""The one place of this front end that runs a row operation on local arrays: the Triton kernels, or plain operations.

Arguments have any leading axes, the rows: logits [..., V], target [...] or [..., V], weight [V], row vectors [...]. The
platform is chosen when the program is lowered, not when it is traced. Where the logits are a slice of the vocabulary,
`part` says which; statistics are then the slice's own.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ce_kernels import Launch, Options, Problem, plan_fused, plan_grad, plan_stats
from jax_api import reference
from jax_api.backend import clusters, compute_capability, interpreting, jax_triton, shared_rows
from jax_api.static import Part, Static, Stats

# What XLA's own ptxas accepts; Triton 3.9 would emit PTX 9.4.
PTX_VERSION = 88


def stats(static: Static, logits: Array, target: Array, weight: Array | None, part: Part) -> Stats:
    """Per-row statistics: one read of the logits."""

    def kernel(logits, target, weight, start):
        launch = plan_stats(_problem(logits, target, part, static.options), with_argmax=static.with_argmax)
        operands = {"logits_ptr": logits, "target_ptr": target, "weight_ptr": weight, "vocab_start_ptr": start}
        out = _run(launch, static.options, operands)
        return Stats(out["loss_ptr"], out["lse_ptr"], out["target_sum_ptr"], out.get("predicted_ptr"))

    def plain(logits, target, weight, start):
        return reference.stats(static, logits, target, weight, Part(start, part.total))

    return _choose(static, kernel, plain, (logits, target, weight, part.start))


def grad(
    static: Static,
    logits: Array,
    target: Array,
    weight: Array | None,
    upstream: reference.Upstream,
    part: Part,
) -> tuple[Array, Array | None]:
    """dlogits, and dtarget of soft targets, for upstream gradients of loss and lse: one read, one write."""

    def kernel(logits, target, weight, start, upstream):
        launch = plan_grad(
            _problem(logits, target, part, static.options),
            dloss_stride=1,
            dlse_stride=0 if upstream.dlse is None else 1,
            dtarget_dtype=target.dtype.name if reference.is_soft(target) else None,
            in_place=True,
        )
        operands = {"logits_ptr": logits, "target_ptr": target, "weight_ptr": weight, "vocab_start_ptr": start}
        operands |= {f"{name}_ptr": array for name, array in upstream._asdict().items()}
        out = _run(launch, static.options, operands)
        return out["logits_ptr"], out.get("dtarget_ptr")

    def plain(logits, target, weight, start, upstream):
        return reference.grad(static.options, logits, target, weight, upstream, Part(start, part.total))

    return _choose(static, kernel, plain, (logits, target, weight, part.start, upstream))


def fused(
    static: Static, logits: Array, target: Array, weight: Array | None, denominator: Array
) -> tuple[Stats, Array]:
    """Statistics, and dlogits of Σ loss / denominator, given for every row of whole logits: denominator [...]."""
    whole = Part(None, logits.shape[-1])

    def kernel(logits, target, weight, denominator):
        launch = plan_fused(_problem(logits, target, whole, static.options), denominator_stride=1, in_place=True)
        operands = {"logits_ptr": logits, "target_ptr": target, "weight_ptr": weight, "denominator_ptr": denominator}
        out = _run(launch, static.options, operands)
        return Stats(out["loss_ptr"], out["lse_ptr"], out["target_sum_ptr"], None), out["logits_ptr"]

    def plain(logits, target, weight, denominator):
        out = reference.stats(static, logits, target, weight, whole)
        upstream = reference.Upstream(out.lse, out.target_sum, 1.0 / denominator, None)
        return out, reference.grad(static.options, logits, target, weight, upstream, whole)[0]

    return _choose(static, kernel, plain, (logits, target, weight, denominator))


def _choose(static: Static, kernel: Callable, plain: Callable, arrays: tuple) -> Any:
    """kernel or plain on arrays, by the implementation asked for or by platform."""
    varying = varying_axes(*jax.tree.leaves(arrays))

    def run(function):
        # Under shard_map every branch must say alike over which mesh axes its outputs vary; a kernel's say nothing.
        return lambda *arrays: jax.tree.map(lambda out: vary(out, varying), function(*arrays))

    if static.implementation == "reference":
        return run(plain)(*arrays)
    if static.implementation == "triton":
        return run(kernel)(*arrays)
    return lax.platform_dependent(*arrays, cuda=run(kernel), default=run(plain))


def varying_axes(*arrays: Array) -> frozenset[str]:
    """The mesh axes over which one of the arrays varies, inside a `jax.shard_map` that keeps track of them."""
    return frozenset().union(*(jax.typeof(array).manual_axis_type.varying for array in arrays))


def vary(array: Array, axes: frozenset[str]) -> Array:
    """The array as one that varies over these mesh axes."""
    missing = axes - varying_axes(array)
    return lax.pcast(array, tuple(sorted(missing)), to="varying") if missing else array


def _problem(logits: Array, target: Array, part: Part, options: Options) -> Problem:
    *rows, n_classes = logits.shape
    soft, smoothed = reference.is_soft(target), bool(options.label_smoothing)
    return Problem(
        n_rows=math.prod(rows),
        n_classes=n_classes,
        logits_dtype=logits.dtype.name,
        soft_targets=soft,
        logits_stride=n_classes,
        target_stride=n_classes if soft else 1,
        total_classes=part.total,
        clusters=clusters(spread=soft or smoothed),
        shared_rows=shared_rows(),
        softcap=options.softcap is not None,
        label_smoothing=smoothed,
    )


def _run(launch: Launch, options: Options, operands: dict[str, Array | None]) -> dict[str, Array]:
    """The launch's outputs by parameter name; "logits_ptr" is dlogits where the launch is in place.

    A kernel sees pointers to N rows, so arrays keep their leading axes.
    """
    logits = operands["logits_ptr"]
    assert logits is not None
    rows = logits.shape[:-1]
    shapes = {
        output.name: jax.ShapeDtypeStruct((*rows, *output.shape[1:]), jnp.dtype(output.dtype))
        for output in launch.outputs
    }
    if launch.in_place:
        shapes["logits_ptr"] = jax.ShapeDtypeStruct(logits.shape, logits.dtype)
    if launch.grid[0] == 0:
        return {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
    scalars: dict[str, Any] = {**options.scalars()}
    if dict(launch.constants)["SCALARS_IN_MEMORY"]:
        scalars |= {
            name: jnp.asarray(value, logits.dtype) for name, value in scalars.items() if isinstance(value, float)
        }
    run = _interpret if interpreting() else _launch
    return run(launch, operands | scalars, shapes)


def _launch(launch: Launch, arguments: dict, shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
    triton_call = jax_triton().triton_call
    from ce_kernels import kernels

    kernel = getattr(kernels, launch.kernel)
    absent = dict.fromkeys(set(kernel.arg_names) - {name for name, _ in launch.constants} - set(shapes))
    # Inside of a loop XLA (jaxlib 0.11.2) would fuse the slicing of operands and results into the call, and with it
    # forget that they share memory: the gradient would land in the logits, and nowhere else.
    guard = lax.optimization_barrier if launch.in_place else lambda arrays: arrays
    arguments = arguments | {"logits_ptr": guard(arguments["logits_ptr"])}
    with warnings.catch_warnings():
        # jax-triton prefers Refs, which lose the varying-axes type inside cond and scan under shard_map.
        warnings.filterwarnings("ignore", "(input_output_aliases|zeroed_outputs) is deprecated", DeprecationWarning)
        out = triton_call(
            kernel=kernel,
            out_type=list(shapes.values()),
            grid=launch.grid,
            name=launch.kernel,
            compute_capability=compute_capability(),
            backend_options={"ptx_version": PTX_VERSION, **launch.options},
            input_output_aliases={0: len(shapes) - 1} if launch.in_place else None,
            zeroed_outputs=tuple(i for i, output in enumerate(launch.outputs) if output.zeroed),
            **absent | arguments | dict(launch.constants),
        )
    return dict(zip(shapes, guard(tuple(out)), strict=True))


def _interpret(launch: Launch, arguments: dict, shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
    from jax.experimental.buffer_callback import buffer_callback

    from ce_kernels import interpreter

    arrays = {name: value for name, value in arguments.items() if isinstance(value, Array)}
    scalars = {name: value for name, value in arguments.items() if name not in arrays}

    def callback(_, outputs, *inputs):
        # Outputs last: where the launch is in place, the one of "logits_ptr" holds the logits already.
        interpreter.run(
            launch, scalars | dict(zip(arrays, inputs, strict=True)) | dict(zip(shapes, outputs, strict=True))
        )

    aliases = {list(arrays).index("logits_ptr"): len(shapes) - 1} if launch.in_place else None
    out = buffer_callback(callback, list(shapes.values()), input_output_aliases=aliases)(*arrays.values())
    return dict(zip(shapes, out, strict=True))
