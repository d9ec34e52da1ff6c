"""The one place of this front end that runs a row operation: the Triton kernels, or the plain operations.

What depends on shapes, strides and options alone is decided once and cached; a call allocates and launches.
"""

import importlib.util
import math
import os
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ce_kernels import Launch, Problem, plan_fused, plan_grad, plan_stats
from ce_kernels.launch import has_clusters
from ce_kernels.spec import check_implementation, fail
from torch_api import layout, reference
from torch_api.rows import Inputs, RowSpec, Stats, Upstream

TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None


def choose_implementation(implementation: str | None, device: torch.device) -> str:
    """'triton' on CUDA devices where Triton is installed, 'reference' elsewhere; an impossible wish raises."""
    check_implementation(implementation)
    if implementation == "reference":
        return "reference"
    if implementation is None:
        return "triton" if device.type == "cuda" and TRITON_IS_INSTALLED else "reference"
    if not TRITON_IS_INSTALLED:
        fail(RuntimeError, "implementation='triton'", "an installed triton", "implementation=None")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        fail(
            RuntimeError,
            f"implementation='triton' for tensors on {device}",
            "a GPU, or Triton's interpreter (environment variable TRITON_INTERPRET=1)",
            "implementation=None to choose by device",
        )
    return "triton"


def stats(inputs: Inputs, spec: RowSpec, *, with_argmax: bool) -> Stats:
    """Per-row statistics: one read of the logits."""
    if spec.implementation == "reference":
        return _plain_stats(inputs, spec, with_argmax)
    logits, target, weight = _readable(inputs)
    launch = _plan_stats(
        logits.shape, logits.stride(), logits.dtype, _target_stride(target), spec, _place(logits), with_argmax
    )
    out = _row_outputs(logits)
    predicted = out[0].new_empty(out[0].shape, dtype=torch.int32) if with_argmax else None
    tensors = {"loss_ptr": out[0], "lse_ptr": out[1], "target_sum_ptr": out[2], "predicted_ptr": predicted}
    _run(launch, logits, {"target_ptr": target, "weight_ptr": weight} | tensors)
    return Stats(*out, predicted)


def grad(
    inputs: Inputs, upstream: Upstream, spec: RowSpec, *, with_dtarget: bool, donate: bool = False
) -> tuple[Tensor, Tensor | None]:
    """dlogits (and dtarget): one read, one write. donate: dlogits overwrites the logits."""
    if spec.implementation == "reference":
        return _plain_grad(inputs, upstream, spec, with_dtarget, donate)
    logits, target, weight = _readable(inputs)
    # A copy made for reading is nobody's: the gradient may overwrite it.
    in_place = donate or logits is not inputs.logits
    dloss, dlse = layout.as_vector(upstream.dloss), layout.as_vector(upstream.dlse)
    strides = (0 if dloss is None else dloss.stride(0), 0 if dlse is None else dlse.stride(0))
    launch = _plan_grad(
        logits.shape,
        logits.stride(),
        logits.dtype,
        _target_stride(target),
        spec,
        _place(logits),
        strides,
        _name(target.dtype) if with_dtarget else None,
        in_place,
    )
    dlogits = None if in_place else layout.empty_gradient(logits)
    dtarget = target.new_empty(target.shape) if with_dtarget else None
    tensors = {
        "target_ptr": target,
        "weight_ptr": weight,
        "lse_ptr": upstream.lse.contiguous(),
        "target_sum_ptr": upstream.target_sum.contiguous(),
        "dloss_ptr": dloss,
        "dlse_ptr": dlse,
        "dlogits_ptr": dlogits,
        "dtarget_ptr": dtarget,
    }
    _run(launch, logits, tensors)
    return logits if dlogits is None else dlogits, dtarget


def fused(inputs: Inputs, denominator: Tensor, spec: RowSpec, *, donate: bool = False) -> tuple[Stats, Tensor]:
    """Statistics, and dlogits of Σ loss / denominator for a 0-d denominator, in one launch."""
    if spec.implementation == "reference":
        out = _plain_stats(inputs, spec, with_argmax=False)
        upstream = Upstream(out.lse, out.target_sum, denominator.reciprocal().expand(out.lse.shape), None)
        return out, _plain_grad(inputs, upstream, spec, with_dtarget=False, donate=donate)[0]
    logits, target, weight = _readable(inputs)
    in_place = donate or logits is not inputs.logits
    launch = _plan_fused(
        logits.shape, logits.stride(), logits.dtype, _target_stride(target), spec, _place(logits), in_place
    )
    loss, lse, target_sum = _row_outputs(logits)
    dlogits = None if in_place else layout.empty_gradient(logits)
    tensors = {
        "target_ptr": target,
        "weight_ptr": weight,
        "denominator_ptr": denominator,
        "loss_ptr": loss,
        "lse_ptr": lse,
        "target_sum_ptr": target_sum,
        "dlogits_ptr": dlogits,
    }
    _run(launch, logits, tensors)
    return Stats(loss, lse, target_sum), logits if dlogits is None else dlogits


def scale_(values: Tensor, scale: Tensor, implementation: str) -> None:
    """values ·= scale for a 0-d scalar, in place; under Triton a scale of 1 costs no pass. values fill their memory."""
    if implementation == "reference":
        values.mul_(scale)
    elif values.numel():
        from ce_kernels.kernels import scale_kernel

        # A few programs a multiprocessor: enough to fill a device, few enough to cost nothing with nothing to do.
        block, programs = 4096, 1024
        grid = (min(programs, -(-values.numel() // block)),)
        _launch(scale_kernel, grid, values.device, (values, scale, values.numel()), {"BLOCK": block, "num_warps": 8})


def _plain_stats(inputs: Inputs, spec: RowSpec, with_argmax: bool) -> Stats:
    out = reference.stats(flat(inputs), spec, with_argmax)
    shape = inputs.logits.shape[:-1]
    if out.loss.shape == shape:
        return out
    # No views: autograd forbids writing to views that a Function returns, and users mask losses in place.
    loss, lse, target_sum = (x.reshape(shape).clone() for x in out[:3])
    return Stats(loss, lse, target_sum, None if out.predicted is None else out.predicted.reshape(shape))


def _plain_grad(
    inputs: Inputs, upstream: Upstream, spec: RowSpec, with_dtarget: bool, donate: bool
) -> tuple[Tensor, Tensor | None]:
    rows = Upstream(*(None if x is None else x.reshape(-1) for x in upstream))  # pyright: ignore[reportArgumentType]
    dlogits, dtarget = reference.grad(flat(inputs), rows, spec, with_dtarget)
    dlogits = dlogits.reshape(inputs.logits.shape)
    if donate:
        dlogits = inputs.logits.detach().copy_(dlogits)
    return dlogits, None if dtarget is None else dtarget.reshape(inputs.target.shape)


def flat(inputs: Inputs) -> Inputs:
    """Inputs with one batch dimension."""
    logits, target, weight = inputs
    n_classes = logits.shape[-1]
    # Not −1: with no rows it would be ambiguous.
    n_rows = math.prod(logits.shape[:-1])
    rows = target.reshape(n_rows, n_classes) if target.is_floating_point() else target.reshape(n_rows)
    return Inputs(logits.reshape(n_rows, n_classes), rows, weight)


def _readable(inputs: Inputs) -> Inputs:
    """Inputs as a kernel can read them, copied where it cannot."""
    logits, target, weight = inputs
    if logits.is_neg() or target.is_neg():
        # The sign that torch.imag of a conjugate leaves to its readers.
        logits, target = logits.resolve_neg(), target.resolve_neg()
    if not logits.is_contiguous() and layout.row_levels(logits.shape, logits.stride()) is None:
        logits = logits.contiguous()
    if not target.is_contiguous():
        levels = layout.row_levels(target.shape, target.stride()) if target.is_floating_point() else None
        if levels is None or levels.rows_inner is not None:
            target = target.contiguous()
    return Inputs(logits, target, weight)


def _target_stride(target: Tensor) -> int | None:
    """The row stride of soft targets; None for class indices, which are contiguous."""
    if not target.is_floating_point():
        return None
    levels = layout.row_levels(target.shape, target.stride())
    assert levels is not None
    return levels.stride


def _row_outputs(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Three buffers, not three views of one: writing to the loss in place must not meet a shared base.
    loss = torch.empty(logits.shape[:-1], dtype=reference.compute_dtype(logits), device=logits.device)
    return loss, torch.empty_like(loss), torch.empty_like(loss)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Place(NamedTuple):
    """What a plan asks of the logits' memory: does it start on a 16-byte boundary; has its device clusters."""

    aligned: bool
    clusters: bool


def _place(logits: Tensor) -> _Place:
    return _Place(logits.data_ptr() % 16 == 0, _has_clusters(logits.device))


@lru_cache
def _has_clusters(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    major, minor = torch.cuda.get_device_capability(device)
    return has_clusters(10 * major + minor)


class _Call(NamedTuple):
    """A launch and every argument of its kernel that is no tensor; scalars of fp64 problems travel in memory."""

    kernel: str
    grid: tuple[int]
    keywords: dict[str, Any]
    scalars_in_memory: tuple[tuple[str, float], ...]
    vocab_start: int | None


@lru_cache(maxsize=4096)
def _plan_stats(shape, strides, dtype, target_stride, spec: RowSpec, place: _Place, with_argmax: bool) -> _Call:
    problem = _problem(shape, strides, dtype, target_stride, spec, place)
    return _call(plan_stats(problem, with_argmax=with_argmax), spec)


@lru_cache(maxsize=4096)
def _plan_grad(
    shape, strides, dtype, target_stride, spec: RowSpec, place: _Place, upstream_strides, dtarget, in_place: bool
) -> _Call:
    problem = _problem(shape, strides, dtype, target_stride, spec, place)
    dloss, dlse = upstream_strides
    launch = plan_grad(problem, dloss_stride=dloss, dlse_stride=dlse, dtarget_dtype=dtarget, in_place=in_place)
    return _call(launch, spec)


@lru_cache(maxsize=4096)
def _plan_fused(shape, strides, dtype, target_stride, spec: RowSpec, place: _Place, in_place: bool) -> _Call:
    problem = _problem(shape, strides, dtype, target_stride, spec, place)
    return _call(plan_fused(problem, denominator_stride=0, in_place=in_place), spec)


def _problem(shape, strides, dtype: torch.dtype, target_stride: int | None, spec: RowSpec, place: _Place) -> Problem:
    levels = layout.row_levels(shape, strides)
    assert levels is not None
    gradient = layout.gradient_levels(shape, strides)
    return Problem(
        n_rows=math.prod(shape[:-1]),
        n_classes=shape[-1],
        logits_dtype=_name(dtype),
        soft_targets=target_stride is not None,
        logits_stride=levels.stride,
        target_stride=1 if target_stride is None else target_stride,
        total_classes=spec.total_classes or shape[-1],
        rows_inner=levels.rows_inner,
        logits_outer_stride=levels.outer_stride,
        dlogits_stride=gradient.stride,
        dlogits_outer_stride=gradient.outer_stride,
        aligned=place.aligned,
        clusters=place.clusters,
    )


def _call(launch: Launch, spec: RowSpec) -> _Call:
    keywords = {**spec.options.scalars(), **dict(launch.constants)}
    in_memory = ()
    if keywords["SCALARS_IN_MEMORY"]:
        in_memory = tuple((name, value) for name, value in spec.options.scalars().items() if isinstance(value, float))
    keywords |= {
        "vocab_start_ptr": None,
        **launch.options,
    }
    for name in ("rows_inner", "logits_outer_stride", *(() if "stats" in launch.kernel else ("dlogits_outer_stride",))):
        keywords.setdefault(name, None)
    return _Call(launch.kernel, launch.grid, keywords, in_memory, spec.vocab_start)


def _run(call: _Call, logits: Tensor, tensors: Mapping[str, Tensor | None]) -> None:
    if call.grid[0] == 0:
        return
    from ce_kernels import kernels

    keywords = call.keywords
    if call.scalars_in_memory or call.vocab_start is not None:
        device = logits.device
        keywords = keywords | {
            name: torch.full((), value, dtype=logits.dtype, device=device) for name, value in call.scalars_in_memory
        }
        if call.vocab_start is not None:
            keywords["vocab_start_ptr"] = torch.full((), call.vocab_start, dtype=torch.int64, device=device)
    kernel = getattr(kernels, call.kernel)
    _launch(kernel, call.grid, logits.device, (logits,), {**tensors, **keywords})


def _launch(kernel: Any, grid: tuple[int], device: torch.device, arguments: tuple, keywords: dict[str, Any]) -> None:
    # A guard costs 3 µs, and the device is nearly always the current one.
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[grid](*arguments, **keywords)
    else:
        with torch.cuda.device(device):
            kernel[grid](*arguments, **keywords)
