"""The one place of this front end that runs a row operation: the Triton kernels, or the plain operations.

Arguments are rows: logits [N, V], target [N] or [N, V], weight [V], row vectors [N]. `jax.vmap` folds the mapped axis
into the rows of one launch; the platform is chosen when the program is lowered, not when it is traced.
"""

import importlib.util
import os
import re
import warnings
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap

from ce_kernels import Launch, Options, Problem, plan_fused, plan_grad, plan_stats
from ce_kernels.launch import has_clusters
from ce_kernels.spec import check_implementation, fail
from jax_api import reference

# What XLA's own ptxas accepts; Triton 3.9 would emit PTX 9.4.
PTX_VERSION = 88
# PTX for the oldest supported GPU runs on every later one: for programs lowered on a host without a GPU.
BASELINE_CAPABILITY = 80
VERSIONS = "jax 0.11.x with jax-triton ≥ 0.4.1 (pip install 'ce-kernels[jax]')"


class Stats(NamedTuple):
    """loss, lse, s = Σq and the argmax (None unless asked for) of every row."""

    loss: Array
    lse: Array
    target_sum: Array
    predicted: Array | None


def interpreting() -> bool:
    """Whether Triton's interpreter is on, which runs the kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose_implementation(implementation: str | None) -> str | None:
    """'triton', 'reference' or None (by platform, at lowering); an impossible wish raises."""
    check_implementation(implementation)
    if implementation == "reference":
        return "reference"
    on_gpu = jax.default_backend() == "gpu"
    obstacle = _obstacle()
    if obstacle is not None:
        if implementation == "triton" or on_gpu:
            wish = "implementation='triton'" if implementation == "triton" else "a GPU backend"
            fail(RuntimeError, f"{wish} with {obstacle}", VERSIONS, "implementation='reference' to do without kernels")
        return "reference"
    if implementation == "triton" and not on_gpu and not interpreting():
        fail(
            RuntimeError,
            f"implementation='triton' on the {jax.default_backend()} backend",
            "a GPU, or Triton's interpreter (environment variable TRITON_INTERPRET=1)",
            "implementation=None to choose by platform",
        )
    return implementation


@lru_cache
def _obstacle() -> str | None:
    """Why the kernels cannot be launched from this JAX, or None."""
    if importlib.util.find_spec("jax_triton") is None:
        return "no jax-triton installed"
    # jax-triton 0.4.1 fails at lowering under jax 0.12: its dead-code rule takes two arguments, jax passes three.
    found = version("jax_triton")
    if jax.__version_info__ >= (0, 12) or tuple(int(part) for part in re.findall(r"\d+", found)[:3]) < (0, 4, 1):
        return f"jax {jax.__version__} and jax-triton {found}"
    return None


def stats(
    logits: Array,
    target: Array,
    weight: Array | None,
    options: Options,
    implementation: str | None,
    *,
    with_argmax: bool,
) -> Stats:
    """Per-row statistics: one read of the logits."""
    return _stats(options, implementation, with_argmax)(logits, target, weight)


@lru_cache
def _stats(options: Options, implementation: str | None, with_argmax: bool) -> Callable[..., Stats]:
    def kernel(logits, target, weight):
        launch = plan_stats(_problem(logits, target), with_argmax=with_argmax)
        out = _run(launch, options, logits, {"target_ptr": target, "weight_ptr": weight})
        return Stats(out["loss_ptr"], out["lse_ptr"], out["target_sum_ptr"], out.get("predicted_ptr"))

    def plain(logits, target, weight):
        return Stats(*reference.stats(logits, target, weight, options, with_argmax))

    return _dispatch(kernel, plain, implementation)


def grad(
    logits: Array,
    target: Array,
    weight: Array | None,
    lse: Array,
    target_sum: Array,
    dloss: Array,
    dlse: Array | None,
    options: Options,
    implementation: str | None,
) -> tuple[Array, Array | None]:
    """dlogits, and dtarget of soft targets, for upstream gradients of loss and lse: one read, one write."""
    rows = (logits, target, lse, target_sum, dloss, *(() if dlse is None else (dlse,)))
    return _grad(options, implementation)(*rows, weight)


@lru_cache
def _grad(options: Options, implementation: str | None) -> Callable[..., tuple[Array, Array | None]]:
    def kernel(logits, target, lse, target_sum, dloss, *dlse_and_weight):
        *dlse, weight = dlse_and_weight
        launch = plan_grad(
            _problem(logits, target),
            dloss_stride=1,
            dlse_stride=len(dlse),
            dtarget_dtype=target.dtype.name if _is_soft(target) else None,
            in_place=True,
        )
        operands = {"target_ptr": target, "weight_ptr": weight, "lse_ptr": lse, "target_sum_ptr": target_sum}
        operands |= {"dloss_ptr": dloss, "dlse_ptr": dlse[0] if dlse else None}
        out = _run(launch, options, logits, operands)
        return out["logits_ptr"], out.get("dtarget_ptr")

    def plain(logits, target, lse, target_sum, dloss, *dlse_and_weight):
        *dlse, weight = dlse_and_weight
        dlse = dlse[0] if dlse else None
        return reference.grad(logits, target, weight, lse, target_sum, dloss, dlse, options, _is_soft(target))

    return _dispatch(kernel, plain, implementation)


def fused(
    logits: Array, target: Array, weight: Array | None, denominator: Array, options: Options, implementation: str | None
) -> tuple[Stats, Array]:
    """Statistics, and dlogits of Σ loss / denominator, given for every row: denominator [N]."""
    return _fused(options, implementation)(logits, target, denominator, weight)


@lru_cache
def _fused(options: Options, implementation: str | None) -> Callable[..., tuple[Stats, Array]]:
    def kernel(logits, target, denominator, weight):
        launch = plan_fused(_problem(logits, target), denominator_stride=1, in_place=True)
        operands = {"target_ptr": target, "weight_ptr": weight, "denominator_ptr": denominator}
        out = _run(launch, options, logits, operands)
        return Stats(out["loss_ptr"], out["lse_ptr"], out["target_sum_ptr"], None), out["logits_ptr"]

    def plain(logits, target, denominator, weight):
        out = Stats(*reference.stats(logits, target, weight, options, False))
        dlogits, _ = reference.grad(
            logits, target, weight, out.lse, out.target_sum, 1.0 / denominator, None, options, False
        )
        return out, dlogits

    return _dispatch(kernel, plain, implementation)


def _dispatch(kernel: Callable, plain: Callable, implementation: str | None) -> Callable:
    """A function of (*rows, weight) that runs kernel or plain; under vmap as one launch, unless weights are mapped.

    Jitted and kept by its callers, so that a call outside of jit compiles once; inlined inside of it.
    """

    def call(*arguments):
        if implementation == "reference":
            return plain(*arguments)
        if implementation == "triton":
            return kernel(*arguments)
        return lax.platform_dependent(*arguments, cuda=kernel, rocm=kernel, default=plain)

    mapped = custom_vmap(call)

    @mapped.def_vmap
    def fold(axis_size, in_batched, *arguments):
        *rows, weight = arguments
        if weight is not None and in_batched[-1]:
            out = _one_by_one(mapped, axis_size, in_batched, arguments)
        else:
            folded = [_fold(array, batched, axis_size) for array, batched in zip(rows, in_batched, strict=False)]
            out = mapped(*folded, weight)
            n_rows = rows[0].shape[1 if in_batched[0] else 0]
            out = jax.tree.map(lambda array: array.reshape(axis_size, n_rows, *array.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return jax.jit(mapped, inline=True)


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


def _is_soft(target: Array) -> bool:
    return jnp.issubdtype(target.dtype, jnp.floating)


def _fold(array: Array, batched: bool, axis_size: int) -> Array:
    if not batched:
        array = jnp.broadcast_to(array, (axis_size, *array.shape))
    return array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])


def _problem(logits: Array, target: Array) -> Problem:
    n_rows, n_classes = logits.shape
    return Problem(
        n_rows=n_rows,
        n_classes=n_classes,
        logits_dtype=logits.dtype.name,
        soft_targets=_is_soft(target),
        logits_stride=n_classes,
        target_stride=n_classes if target.ndim == 2 else 1,
        total_classes=n_classes,
        clusters=_has_clusters(),
    )


@lru_cache
def _has_clusters() -> bool:
    # Programs lowered on a host without a GPU are for every supported one.
    if jax.default_backend() != "gpu":
        return False
    capability = getattr(jax.devices()[0], "compute_capability", "0")
    return capability.replace(".", "").isdigit() and has_clusters(int(capability.replace(".", "")))


def _run(launch: Launch, options: Options, logits: Array, operands: dict[str, Array | None]) -> dict[str, Array]:
    """The launch's outputs by parameter name; "logits_ptr" is dlogits where the launch is in place."""
    shapes = {output.name: jax.ShapeDtypeStruct(output.shape, jnp.dtype(output.dtype)) for output in launch.outputs}
    if launch.in_place:
        shapes["logits_ptr"] = jax.ShapeDtypeStruct(logits.shape, logits.dtype)
    if launch.grid[0] == 0:
        return {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
    scalars: dict[str, Any] = {**options.scalars()}
    if dict(launch.constants)["SCALARS_IN_MEMORY"]:
        scalars |= {
            name: jnp.asarray(value, logits.dtype) for name, value in scalars.items() if isinstance(value, float)
        }
    arguments = {"logits_ptr": logits} | operands | scalars
    run = _interpret if interpreting() else _launch
    return run(launch, arguments, shapes)


def _launch(launch: Launch, arguments: dict, shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
    triton_call = _jax_triton().triton_call
    from ce_kernels import kernels

    kernel = getattr(kernels, launch.kernel)
    absent = dict.fromkeys(set(kernel.arg_names) - {name for name, _ in launch.constants} - set(shapes))
    with warnings.catch_warnings():
        # jax-triton prefers Refs, which lose the varying-axes type inside cond and scan under shard_map.
        warnings.filterwarnings("ignore", "input_output_aliases is deprecated", DeprecationWarning)
        out = triton_call(
            kernel=kernel,
            out_type=list(shapes.values()),
            grid=launch.grid,
            name=launch.kernel,
            compute_capability=None if jax.default_backend() == "gpu" else BASELINE_CAPABILITY,
            backend_options={"ptx_version": PTX_VERSION, **launch.options},
            input_output_aliases={0: len(shapes) - 1} if launch.in_place else None,
            **absent | arguments | dict(launch.constants),
        )
    return dict(zip(shapes, out, strict=True))


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


def _jax_triton() -> ModuleType:
    # jax-triton 0.4 deletes the user's TRITON_CACHE_DIR, which other Triton programs of the process rely on.
    cache_dir = os.environ.get("TRITON_CACHE_DIR")
    import jax_triton

    if cache_dir is not None:
        os.environ["TRITON_CACHE_DIR"] = cache_dir
    return jax_triton
