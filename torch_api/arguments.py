"""A call's arguments, checked: by shapes, dtypes and options, once for all calls that have them in common."""

from functools import lru_cache
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from ce_kernels import Options
from ce_kernels.checks import (
    Facts,
    check_denominator,
    check_logits,
    check_target,
    check_weight,
    denominator_error,
    is_number,
    label_error,
)
from ce_kernels.spec import fail
from torch_api import reductions, tracing
from torch_api.launch import choose_implementation
from torch_api.reference import compute_dtype
from torch_api.rows import Inputs, RowSpec


class Choices(NamedTuple):
    """The arguments of a public function that act on rows and are no tensors."""

    ignore_index: int | None = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    dim: int | None = None
    implementation: str | None = None


class Call(NamedTuple):
    """What follows from shapes, dtypes and options: where the classes are, and what the rows have in common."""

    axis: int
    soft: bool
    spec: RowSpec


def checked(
    input: Tensor, target: Tensor, weight: Tensor | None, choices: Choices, slices: int = 1
) -> tuple[Inputs, RowSpec]:
    """The arguments as rows, classes last, and what these have in common. Raises what the public functions document.

    Of a vocabulary in several slices input, soft targets and weight are one; slices 0 leaves labels unchecked.
    """
    if not (
        isinstance(input, Tensor) and isinstance(target, Tensor) and (weight is None or isinstance(weight, Tensor))
    ):
        _no_tensor(input=input, target=target, weight=target if weight is None else weight)
    facts = (input.shape, input.dtype, input.device), (target.shape, target.dtype, target.device)
    of_weight = None if weight is None else (weight.shape, weight.dtype, weight.device)
    call = None
    if not torch.compiler.is_compiling():
        try:
            call = _check_once(*facts, of_weight, *choices)
        except TypeError:
            # It may mean no more than an unhashable argument, or a symbolic size.
            call = None
    axis, soft, spec = call or _check(*facts, of_weight, *choices)
    if soft:
        target = _classes_last(target, axis)
    elif target.dtype not in (torch.int32, torch.int64):
        # Narrow and unsigned integers cannot hold a negative ignore_index.
        target = target.to(torch.int64)
    inputs = Inputs(_classes_last(input, axis), target, weight if weight is None else weight.resolve_neg().contiguous())
    if not soft and slices and target.is_cpu and tracing.has_values(input, target):
        check_labels(target, slices * input.shape[axis], spec.options)
    return inputs, spec


def _no_tensor(**arguments: object) -> NoReturn:
    name, value = next((name, value) for name, value in arguments.items() if not isinstance(value, Tensor))
    fail(TypeError, f"{name} of type {type(value).__name__}", "a torch.Tensor", f"torch.as_tensor({name})")


def _check(logits, target, weight, *choices) -> Call:
    *options, dim, implementation = choices
    options = Options.checked(*options)
    facts = _facts("input", *logits), _facts("target", *target)
    rank = len(facts[0].shape)
    axis = check_logits(facts[0], min(1, rank - 1) if dim is None else dim)
    if tracing.has_symbols(logits[0]):
        _state_equal_sizes(logits[0], target[0], axis)
    soft = check_target(*facts, axis, options)
    if weight is not None:
        check_weight(_facts("weight", *weight), facts[0].shape[axis])
    for name, other in (("target", target), ("weight", weight)):
        if other is not None and other[2] != logits[2]:
            passed = f"{name} on {other[2]} with input on {logits[2]}"
            fail(ValueError, passed, "one device", f"{name}.to(input.device)")
    if not soft:
        # What narrower labels become.
        options = options.for_labels("int32" if facts[1].dtype == "int32" else "int64")
    return Call(axis, soft, RowSpec(options, choose_implementation(implementation, logits[2])))


def _state_equal_sizes(logits: torch.Size, target: torch.Size, axis: int) -> None:
    """Tells a tracer that sizes only known when the program runs are equal, and has the program check it."""
    # Here, for it takes half a second.
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    rows = logits if len(target) == len(logits) else [size for i, size in enumerate(logits) if i != axis]
    for size, other in zip(rows, target, strict=False):
        if guard_or_true(size == other):
            torch._check(size == other)


# By type too: True is no number, though it equals 1.
_check_once = lru_cache(maxsize=4096, typed=True)(_check)


def facts_of(name: str, array: Tensor) -> Facts:
    """What the checks need to know of a tensor."""
    return _facts(name, array.shape, array.dtype, array.device)


def _facts(name: str, shape: torch.Size, dtype: torch.dtype, _: torch.device) -> Facts:
    return Facts(name, tuple(shape), str(dtype).removeprefix("torch."))


def _classes_last(array: Tensor, axis: int) -> Tensor:
    return array if axis == array.ndim - 1 else array.movedim(axis, -1)


def invalid_labels(target: Tensor, n_classes: int, options: Options) -> Tensor:
    """Which labels are no class and not ignored."""
    bad = (target < 0) | (target >= n_classes)
    return bad if options.ignore_index is None else bad & (target != options.ignore_index)


def check_labels(target: Tensor, n_classes: int, options: Options, name: str = "target") -> None:
    """Raises the IndexError of a label that is no class."""
    bad = invalid_labels(target, n_classes, options)
    if bad.any():
        label_error(name, int(target[bad].flatten()[0]), n_classes)


def checked_denominator(denominator: float | Tensor, dtype: torch.dtype, device: torch.device) -> float | Tensor:
    """The user's divisor of `mean`: a number, or 0-d on the device, never read by the host."""
    if isinstance(denominator, Tensor):
        check_denominator(facts_of("denominator", denominator))
        if denominator.device.type not in ("cpu", device.type):
            passed = f"denominator on {denominator.device} with input on {device}"
            fail(ValueError, passed, "one device", "denominator.to(input.device)")
        return denominator.reshape(()).to(device=device, dtype=dtype, non_blocking=True).resolve_neg()
    if isinstance(denominator, torch.SymInt | torch.SymFloat):
        return denominator  # a tracer's number
    if not is_number(denominator):
        denominator_error(denominator)
    return float(denominator)


def divisor(inputs: Inputs, spec: RowSpec, denominator: float | Tensor | None) -> float | Tensor:
    """The divisor of `mean`: a number where the host knows it, else 0-d on the device, which is never read."""
    dtype, device = compute_dtype(inputs.logits), inputs.logits.device
    if denominator is not None:
        return checked_denominator(denominator, dtype, device)
    if inputs.target.is_floating_point():
        return inputs.target.numel() // inputs.target.shape[-1]
    if inputs.weight is None and spec.options.ignore_index is None:
        return inputs.target.numel()
    return reductions.label_mass(inputs, spec, dtype)
