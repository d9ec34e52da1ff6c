"""Sums over rows, of one launch each where there are few rows: PyTorch's own take two or three, 5 µs each (H200)."""

from typing import Any

import torch
from torch import Tensor

from torch_api import launch
from torch_api.rows import RowSpec

# One program sums this many rows in about the time of a launch.
FEW_ROWS = 65536
BLOCK, NUM_WARPS = 4096, 16


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


def count(target: Tensor, ignore_index: int, dtype: torch.dtype, spec: RowSpec) -> Tensor:
    """How many labels are not ignore_index, 0-d."""
    if not _few(target, spec):
        return (target != ignore_index).sum(dtype=dtype)
    from ce_kernels.kernels import count_kernel

    out = torch.empty((), dtype=dtype, device=target.device)
    _one_program(count_kernel, target, (target, ignore_index, out, target.numel()), {})
    return out


def _few(rows: Tensor, spec: RowSpec) -> bool:
    return spec.implementation == "triton" and 0 < rows.numel() <= FEW_ROWS and rows.is_contiguous()


def _mean(values: Tensor, divisor: Tensor, *, sum_divisor: bool) -> Tensor:
    from ce_kernels.kernels import mean_kernel

    out = torch.empty((), dtype=values.dtype, device=values.device)
    _one_program(mean_kernel, values, (values, divisor, out, values.numel()), {"SUM_DIVISOR": sum_divisor})
    return out


def _one_program(kernel: Any, rows: Tensor, arguments: tuple, constants: dict[str, Any]) -> None:
    launch.run_kernel(kernel, (1,), rows.device, arguments, {"BLOCK": BLOCK, "num_warps": NUM_WARPS, **constants})
