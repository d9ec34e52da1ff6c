"""The one place of this front end that runs a row operation: the Triton kernels, or the plain operations.

What depends on shapes, strides and options alone is decided once and cached; a call allocates and launches.
"""

import importlib.util
import math
import os
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ce_kernels import Launch, Problem, plan_fused, plan_grad, plan_stats
from ce_kernels.launch import can_share_rows, has_clusters, has_overlap
from ce_kernels.spec import check_implementation, fail
from torch_api import layout, reference, slices
from torch_api.rows import Inputs, RowSpec, Stats, Upstream

TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None


def choose_implementation(implementation: str | None, device: torch.device) -> str:
    """'triton' on NVIDIA GPUs where Triton is installed, 'reference' elsewhere; an impossible wish raises."""
    check_implementation(implementation)
    if implementation == "reference":
        return "reference"
    on_nvidia = device.type == "cuda" and torch.version.hip is None
    if implementation is None:
        return "triton" if on_nvidia and TRITON_IS_INSTALLED else "reference"
    if not TRITON_IS_INSTALLED:
        fail(RuntimeError, "implementation='triton'", "an installed triton", "implementation=None")
    if not on_nvidia and os.environ.get("TRITON_INTERPRET") != "1":
        fail(
            RuntimeError,
            f"implementation='triton' for tensors on {device}",
            "an NVIDIA GPU, or Triton's interpreter (environment variable TRITON_INTERPRET=1)",
            "implementation=None to choose by device",
        )
    return "triton"


def stats(inputs: Inputs, spec: RowSpec, *, with_argmax: bool) -> Stats:
    """Per-row statistics: one read of the logits."""
    if spec.implementation == "reference":
        if slices.overflows_cache(inputs):
            return slices.stats(_plain_stats, inputs, spec, with_argmax=with_argmax)
        return _plain_stats(inputs, spec, with_argmax=with_argmax)
    if slices.is_scattered(inputs):
        return slices.stats(stats, inputs, spec, with_argmax=with_argmax)
    inputs = _readable(inputs)
    call = _plan_stats(_arrays(inputs), spec, with_argmax)
    loss, lse, target_sum = _row_outputs(call, inputs.logits)
    predicted = torch.empty_like(loss, dtype=torch.int32) if with_argmax else None
    _run(call, inputs, (), (loss, lse, target_sum, predicted))
    return Stats(loss, lse, target_sum, predicted)


def grad(
    inputs: Inputs, upstream: Upstream, spec: RowSpec, *, with_dtarget: bool, donate: bool = False
) -> tuple[Tensor, Tensor | None]:
    """dlogits (and dtarget): one read, one write. donate: dlogits overwrites the logits."""
    if spec.implementation == "reference":
        if slices.overflows_cache(inputs):
            return slices.grad(_plain_grad, inputs, upstream, spec, with_dtarget=with_dtarget, donate=donate)
        return _plain_grad(inputs, upstream, spec, with_dtarget=with_dtarget, donate=donate)
    if slices.is_scattered(inputs):
        return slices.grad(grad, inputs, upstream, spec, with_dtarget=with_dtarget, donate=donate)
    readable = _readable(inputs)
    logits, target, _ = readable
    # A copy made for reading is nobody's: the gradient may overwrite it.
    in_place = donate or logits is not inputs.logits
    dloss, dlse = layout.as_vector(upstream.dloss), layout.as_vector(upstream.dlse)
    strides = (0 if dloss is None else dloss.stride(0), 0 if dlse is None else dlse.stride(0))
    dtarget_dtype = _name(target.dtype) if with_dtarget else None
    call = _plan_grad(_arrays(readable), spec, strides, dtarget_dtype, in_place)
    dlogits = None if in_place else _gradient_output(call, logits)
    dtarget = target.new_empty(target.shape) if with_dtarget else None
    rows = (upstream.lse.contiguous(), upstream.target_sum.contiguous(), dloss, dlse)
    _run(call, readable, rows, (dlogits, dtarget))
    return logits if dlogits is None else dlogits, dtarget


def fused(inputs: Inputs, denominator: Tensor, spec: RowSpec, *, donate: bool = False) -> tuple[Stats, Tensor]:
    """Statistics, and dlogits of Σ loss / denominator for a 0-d denominator, in one launch."""
    if spec.implementation == "reference":
        if slices.overflows_cache(inputs):
            return slices.fused(_plain_fused, inputs, denominator, spec, donate=donate)
        return _plain_fused(inputs, denominator, spec, donate=donate)
    if slices.is_scattered(inputs):
        return slices.fused(fused, inputs, denominator, spec, donate=donate)
    readable = _readable(inputs)
    logits = readable.logits
    in_place = donate or logits is not inputs.logits
    call = _plan_fused(_arrays(readable), spec, in_place)
    loss, lse, target_sum = _row_outputs(call, logits)
    dlogits = None if in_place else _gradient_output(call, logits)
    outputs = (loss, lse, target_sum, dlogits)
    for exchange in call.exchange:
        words = None if exchange is None else torch.zeros(exchange, dtype=torch.int32, device=logits.device)
        outputs = (*outputs, words)
        if words is not None and os.environ.get("TRITON_INTERPRET") == "1":
            # Its programs run one after the other: the first time they only leave what they have to say.
            storage = logits.untyped_storage().clone()
            copy = logits.new_empty(0).set_(storage, logits.storage_offset(), logits.shape, logits.stride())
            _run(call, readable._replace(logits=copy), (denominator,), outputs)
    _run(call, readable, (denominator,), outputs)
    return Stats(loss, lse, target_sum), logits if dlogits is None else dlogits


def scale_(values: Tensor, scale: Tensor, implementation: str) -> None:
    """values ·= scale for a 0-d scalar, in place; under Triton a scale of 1 costs no pass. values fill their memory."""
    if implementation == "reference":
        values.mul_(scale)
    elif values.numel():
        # A few programs a multiprocessor: enough to fill a device, few enough to cost nothing with nothing to do.
        block, programs = 16384, 1056
        programs = min(programs, -(-values.numel() // block))
        arguments = (values, layout.as_stored(scale), values.numel())
        run_alone("scale_kernel", programs, arguments, (block,), num_warps=16)


def _plain_stats(inputs: Inputs, spec: RowSpec, *, with_argmax: bool) -> Stats:
    out = reference.stats(flat(inputs), spec, with_argmax)
    shape = inputs.logits.shape[:-1]
    if out.loss.shape == shape:
        return out
    # No views: autograd forbids writing to views that a Function returns, and users mask losses in place.
    loss, lse, target_sum = (x.reshape(shape).clone() for x in out[:3])
    return Stats(loss, lse, target_sum, None if out.predicted is None else out.predicted.reshape(shape))


def _plain_grad(
    inputs: Inputs, upstream: Upstream, spec: RowSpec, *, with_dtarget: bool, donate: bool
) -> tuple[Tensor, Tensor | None]:
    rows = Upstream(*(None if x is None else x.reshape(-1) for x in upstream))  # pyright: ignore[reportArgumentType]
    dlogits, dtarget = reference.grad(flat(inputs), rows, spec, with_dtarget)
    if dtarget is not None:
        dtarget = layout.laid_out(dtarget.reshape(inputs.target.shape), inputs.target)
    dlogits = dlogits.reshape(inputs.logits.shape)
    if donate:
        return inputs.logits.detach().copy_(dlogits), dtarget
    return layout.laid_out(dlogits, inputs.logits), dtarget


def _plain_fused(inputs: Inputs, denominator: Tensor, spec: RowSpec, *, donate: bool) -> tuple[Stats, Tensor]:
    out = _plain_stats(inputs, spec, with_argmax=False)
    upstream = Upstream(out.lse, out.target_sum, denominator.reciprocal().expand(out.lse.shape), None)
    return out, _plain_grad(inputs, upstream, spec, with_dtarget=False, donate=donate)[0]


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
    if logits.ndim == 1:
        logits = logits.contiguous()
    if not target.is_contiguous():
        levels = layout.row_levels(target.shape, target.stride()) if target.is_floating_point() else None
        if levels is None or levels.rows_inner is not None or levels.class_stride != 1:
            target = target.contiguous()
    return inputs if logits is inputs.logits and target is inputs.target else Inputs(logits, target, weight)


def _soft_rows(target: Tensor) -> tuple[int, bool] | None:
    """The row stride of soft targets, and whether they start on a 16-byte boundary; None for class indices."""
    if not target.is_floating_point():
        return None
    levels = layout.row_levels(target.shape, target.stride())
    assert levels is not None
    return levels.stride, target.data_ptr() % 16 == 0


def _row_outputs(call: "_Call", logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Three buffers, not three views of one: writing to the loss in place must not meet a shared base. With strides:
    # `torch.empty` takes twice the time.
    loss = torch.empty_strided(*call.rows, dtype=call.dtype, device=logits.device)
    return loss, torch.empty_like(loss), torch.empty_like(loss)


def _gradient_output(call: "_Call", logits: Tensor) -> Tensor:
    return torch.empty_strided(logits.shape, call.gradient_strides, dtype=logits.dtype, device=logits.device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _arrays(inputs: Inputs) -> tuple:
    """All that a plan knows of the arrays. A plain tuple: it is made and hashed in every call."""
    logits, target, _ = inputs
    # Does it start on a 16-byte boundary?
    aligned = logits.data_ptr() % 16 == 0
    return logits.shape, logits.stride(), logits.dtype, logits.device, aligned, _soft_rows(target)


@lru_cache
def _capability(device: torch.device) -> int:
    """80, 90, …; 0 where there is none."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


# Kernels and what Triton compiled of them, by what it looks at in arguments: its own search takes as long as a launch.
_Compiled = dict[tuple, tuple[Any, Any]]


class _Call(NamedTuple):
    """A launch: what it allocates, and every argument of its kernel that is no array, in the kernel's order."""

    kernel: str
    grid: tuple[int, int, int]
    rows: tuple[tuple[int, ...], tuple[int, ...]]
    dtype: torch.dtype
    gradient_strides: tuple[int, ...]
    exchange: tuple[tuple[int, ...] | None, ...]
    scalars: tuple[int | float | None, ...]
    constants: tuple[int | bool, ...]
    options: dict[str, Any]
    scalars_in_memory: bool
    vocab_start: int | None
    compiled: _Compiled


@lru_cache(maxsize=4096)
def _plan_stats(arrays: tuple, spec: RowSpec, with_argmax: bool) -> _Call:
    return _call(plan_stats(_problem(arrays, spec), with_argmax=with_argmax), arrays, spec)


@lru_cache(maxsize=4096)
def _plan_grad(
    arrays: tuple, spec: RowSpec, upstream_strides: tuple[int, int], dtarget: str | None, in_place: bool
) -> _Call:
    problem = _problem(arrays, spec)
    dloss, dlse = upstream_strides
    launch = plan_grad(problem, dloss_stride=dloss, dlse_stride=dlse, dtarget_dtype=dtarget, in_place=in_place)
    return _call(launch, arrays, spec)


@lru_cache(maxsize=4096)
def _plan_fused(arrays: tuple, spec: RowSpec, in_place: bool) -> _Call:
    return _call(plan_fused(_problem(arrays, spec), denominator_stride=0, in_place=in_place), arrays, spec)


def _problem(arrays: tuple, spec: RowSpec) -> Problem:
    shape, strides, dtype, device, aligned, soft_rows = arrays
    levels = layout.row_levels(shape, strides)
    assert levels is not None
    gradient = layout.gradient_levels(shape, strides)
    soft, smoothed = soft_rows is not None, bool(spec.options.label_smoothing)
    target_stride, target_aligned = soft_rows or (1, True)
    return Problem(
        n_rows=math.prod(shape[:-1]),
        n_classes=shape[-1],
        logits_dtype=_name(dtype),
        soft_targets=soft,
        logits_stride=levels.stride,
        target_stride=target_stride,
        total_classes=spec.total_classes or shape[-1],
        rows_inner=levels.rows_inner,
        logits_outer_stride=levels.outer_stride,
        dlogits_stride=gradient.stride,
        dlogits_outer_stride=gradient.outer_stride,
        class_stride=levels.class_stride,
        dlogits_class_stride=gradient.class_stride,
        aligned=aligned,
        target_aligned=target_aligned,
        clusters=has_clusters(_capability(device), spread=soft or smoothed),
        shared_rows=can_share_rows(_capability(device), _multiprocessors(device)),
        overlapped=has_overlap(_capability(device)),
        softcap=spec.options.softcap is not None,
        label_smoothing=smoothed,
    )


def _call(launch: Launch, arrays: tuple, spec: RowSpec) -> _Call:
    shape, strides, *_ = arrays
    known = {**spec.options.scalars(), **dict(launch.constants)}
    # By place, a launch takes a fifth less than by name. Names of pointers end in _ptr, those of constants are upper
    # case; a scalar that is not known is off.
    names = [name for name in kernel(launch.kernel).arg_names if not name.endswith("_ptr")]
    shapes = {output.name: output.shape for output in launch.outputs}
    return _Call(
        launch.kernel,
        (*launch.grid, 1, 1),
        (shape[:-1], layout.contiguous_strides(shape[:-1])),
        torch.float64 if known["SCALARS_IN_MEMORY"] else torch.float32,
        layout.gradient_strides(shape, strides),
        # The shape, None where no rows are shared, nothing where the kernel knows no such parameter.
        tuple(shapes.get(name) for name in kernel(launch.kernel).arg_names if name == "exchange_ptr"),
        tuple(known.get(name) for name in names if not name.isupper()),
        tuple(known[name] for name in names if name.isupper()),
        launch.options,
        known["SCALARS_IN_MEMORY"],
        spec.vocab_start,
        {},
    )


def _run(call: _Call, inputs: Inputs, rows: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]) -> None:
    if call.grid[0] == 0:
        return
    device, scalars, vocab_start = inputs.logits.device, call.scalars, None
    if call.scalars_in_memory:
        dtype = inputs.logits.dtype
        scalars = [torch.full((), x, dtype=dtype, device=device) if isinstance(x, float) else x for x in scalars]
    if call.vocab_start is not None:
        vocab_start = torch.full((), call.vocab_start, dtype=torch.int64, device=device)
    arguments = (*inputs, vocab_start, *rows, *scalars, *outputs, *call.constants)
    # The rest follows from the call, and what is allocated for it is aligned.
    looked_at = tuple([_looked_at(x) for x in (*inputs[1:], *rows)])
    run_kernel(call.kernel, call.grid, arguments, call.options, call.compiled, looked_at)


@lru_cache
def kernel(name: str) -> Any:
    """A kernel by its name: the module imports Triton, which only a launch may do."""
    from ce_kernels import kernels

    return getattr(kernels, name)


def clusters(device: torch.device) -> bool:
    """Whether a program that sums may span several multiprocessors."""
    return has_clusters(_capability(device), spread=True)


def run_alone(name: str, programs: int, arguments: tuple, constants: tuple, num_warps: int, num_ctas: int = 1) -> None:
    """`run_kernel` for the kernels around the rows', which begin while the launch before them ends."""
    constants, options, compiled = _plan_alone(name, arguments[0].device, constants, num_warps, num_ctas)
    looked_at = tuple([_looked_at(x) for x in arguments])
    run_kernel(name, (programs, 1, 1), (*arguments, *constants), options, compiled, looked_at)


@lru_cache
def _plan_alone(
    name: str, device: torch.device, constants: tuple, num_warps: int, num_ctas: int
) -> tuple[tuple, dict[str, Any], _Compiled]:
    """All the kernel's constants, the compiler's options, and room for what Triton compiles."""
    overlapped = has_overlap(_capability(device))
    options = {"num_warps": num_warps, "num_ctas": num_ctas, "enable_fp_fusion": False}
    if overlapped:
        options["launch_pdl"] = True
    return (*constants, overlapped), options, {}


def _looked_at(argument: Tensor | int | None) -> tuple | None:
    """What Triton compiles an argument for: a pointer's dtype and alignment, an integer's size and divisibility."""
    if argument is None:
        return None
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31


def run_kernel(
    name: str, grid: tuple[int, int, int], arguments: tuple, options: dict[str, Any], compiled: _Compiled, key: tuple
) -> None:
    """Launches on the device of the first argument, with arguments in the kernel's order and the compiler's options.

    compiled remembers what Triton compiled, under key.
    """
    device = arguments[0].get_device()
    # A guard costs 3 µs, and the device is nearly always the current one.
    is_current = device < 0 or device == torch.accelerator.current_device_index()
    with nullcontext() if is_current else torch.cuda.device(device):
        function = kernel(name)
        source, known = compiled.get(key, (None, None))
        if source is function:
            known[grid](*arguments)
            return
        known = function[grid](*arguments, **options)
        # Not None, as from the interpreter, and not the promise of a kernel that is being compiled elsewhere.
        if hasattr(type(known), "__getitem__"):
            compiled[key] = function, known
