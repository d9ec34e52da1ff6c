"""Sums over rows, of one launch each where there are few rows: PyTorch's own take two or three, 5 µs each (H200)."""

import torch
from torch import Tensor

from torch_api import launch, tracing
from torch_api.reference import counted_weights, label_weights
from torch_api.rows import Inputs, RowSpec

# One program, of several multiprocessors where there are many, sums this many rows in about the time of a launch.
FEW_ROWS = 65536


def mean(values: Tensor, divisor: Tensor, spec: RowSpec) -> Tensor:
    """Σ values / divisor for a 0-d divisor of the values' dtype."""
    if not _few(values, spec):
        return values.sum() / divisor
    return _mean(values, divisor, sum_divisor=False)


def ratio(values: Tensor, divisors: Tensor, spec: RowSpec) -> Tensor:
    """Σ values / Σ divisors."""
    if not _few(values, spec):
        return values.sum() / divisors.sum()
    return _mean(values, divisors, sum_divisor=True)


def label_mass(inputs: Inputs, spec: RowSpec, dtype: torch.dtype) -> Tensor:
    """Σ of the labels' class weights (1 each without them) over rows that are not ignored, 0-d."""
    _, target, weight = inputs
    ignore_index = spec.options.ignore_index
    trains_weight = weight is not None and weight.requires_grad
    # Eager first: a question about a symbolic size is a guard.
    if tracing.is_eager(*inputs) and not trains_weight and _few(target, spec):
        out = torch.empty_strided((), (), dtype=dtype, device=target.device)
        n_classes = 0 if weight is None else len(weight)
        _one_program("divisor_kernel", (target, weight, ignore_index, out, target.numel(), n_classes), target.numel())
        return out
    if weight is None:
        return (target != ignore_index).sum(dtype=dtype)
    return counted_weights(label_weights(inputs, 0, dtype), inputs, spec.options, len(weight)).sum()


def _few(rows: Tensor, spec: RowSpec) -> bool:
    return spec.implementation == "triton" and 0 < rows.numel() <= FEW_ROWS and rows.is_contiguous()


def _mean(values: Tensor, divisor: Tensor, *, sum_divisor: bool) -> Tensor:
    out = torch.empty_strided((), (), dtype=values.dtype, device=values.device)
    _one_program("mean_kernel", (values, divisor, out, values.numel()), values.numel(), sum_divisor)
    return out


def _one_program(kernel: str, arguments: tuple, n_rows: int, *constants: bool) -> None:
    # More threads than the rows need take 1 µs longer; of 65536, eight multiprocessors save 4 µs of 8 (H200).
    if n_rows <= 4096:
        block, num_warps, num_ctas = 4096, 16, 1
    elif n_rows <= 16384 or not launch.clusters(arguments[0].device):
        block, num_warps, num_ctas = 8192, 32, 1
    else:
        block, num_warps, num_ctas = 32768, 32, 8
    launch.run_alone(kernel, 1, arguments, (*constants, block), num_warps, num_ctas)
