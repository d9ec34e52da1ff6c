"""The public functions. The formula they compute stands in `ce_kernels.spec`."""

from typing import NamedTuple

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
from ce_kernels.spec import Implementation, Reduction, check_reduction, fail
from torch_api.launch import choose_implementation
from torch_api.reference import compute_dtype
from torch_api.rules import FusedLoss, RowLosses


class RowOutputs(NamedTuple):
    """Per-row results in the shape of the labels: loss and lse (both differentiable) and the argmax class (int64)."""

    loss: Tensor
    lse: Tensor
    predicted: Tensor


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    denominator: float | Tensor | None = None,
    dim: int | None = None,
    implementation: Implementation | None = None,
) -> Tensor:
    r"""Softmax cross-entropy of logits, as `torch.nn.functional.cross_entropy` with z-loss, soft cap and logit scale.

    Per row of logits r, with α = label_smoothing, λ = z_loss, w the class weights (1 when absent), V classes::

        x = logit_scale · r                 with a softcap c:  x = c · tanh(logit_scale · r / c)
        q = w · ((1 − α) · t + α / V)       t = onehot(target), or the row of target probabilities
        ℓ = Σ_k q_k · (lse − x_k) + λ · lse²,   lse = log Σ_k exp(x_k)

    `none` returns ℓ; `sum` Σℓ; `mean` Σℓ / Σ w_target over rows that are not ignored (class indices), Σℓ / rows
    (probabilities), or Σℓ / denominator.

    Args:
        input: logits (C), (N, C) or (N, C, d1, …), float16, bfloat16, float32 or float64; or any shape with `dim`.
        target: class indices (integers, no uint64) in the shape of input without its class dimension, or class
            probabilities in the shape of input. Gradients flow to input, to probabilities and to weight.
        weight: class weights [C], floating point.
        ignore_index: rows with this class index have loss 0 and no gradient. None ignores none.
        reduction: "none", "mean" or "sum".
        label_smoothing: α in [0, 1].
        z_loss: λ ≥ 0, in nats⁻¹: the weight of lse² (PaLM, arXiv:2204.02311).
        softcap: c > 0, or None (Gemma 2, arXiv:2408.00118). Masked classes (−inf) stay masked.
        logit_scale: an inverse temperature.
        denominator: replaces the divisor of `mean`; a number or a tensor of one element, never read by the host.
        dim: the class dimension; None means 1, or 0 for a single row. dim=-1 takes [batch, time, classes] as it is.
        implementation: "triton", "reference" or None to choose by device.

    Returns:
        The loss in nats: float32 (float64 for float64 input); in target's shape for `none`, else 0-d. Out-of-range
        class indices raise on the CPU; on a device they make their row's loss and gradient NaN.

    Raises:
        TypeError, ValueError: what was passed, what is required, what to write instead.
        IndexError: an out-of-range class index, where finding it needs no device synchronisation.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]], requires_grad=True)
        >>> loss = cross_entropy(logits, torch.tensor([0, -100]))
        >>> round(loss.item(), 4)
        0.2413
        >>> loss.backward()
        >>> logits.grad[1]
        tensor([0., 0., 0.])

    Source: the contract in `ce_kernels.spec`; `torch.nn.functional.cross_entropy`.
    """
    check_reduction(reduction, denominator)
    options = Options.checked(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    rows = _rows(input, target, weight, options, dim, implementation)
    if reduction == "none":
        return _row_losses(rows, with_argmax=False)[0].view(rows.shape)
    divisor = None if reduction == "sum" else _divisor(rows, denominator)
    others = (rows.target, rows.weight, divisor)
    if (
        torch.is_grad_enabled()
        and rows.logits.requires_grad
        # Loss scaling exists because p / N is below fp16's range: round only after the upstream gradient is known.
        and rows.logits.dtype != torch.float16
        and not any(other is not None and other.requires_grad for other in others)
    ):
        if divisor is None:
            divisor = torch.ones((), dtype=compute_dtype(rows.logits), device=input.device)
        return FusedLoss.apply(rows.logits, rows.target, rows.weight, divisor, rows.options, rows.implementation)
    total = _row_losses(rows, with_argmax=False)[0].sum()
    return total if divisor is None else total / divisor


def cross_entropy_rows(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    dim: int | None = None,
    implementation: Implementation | None = None,
) -> RowOutputs:
    r"""Per-row loss, lse and argmax in one read of the logits: log-probabilities, z-loss variants, accuracy, analysis.

    loss is ℓ of `cross_entropy` (same arguments); lse = log Σ_k exp(x_k); predicted = argmax_k of the scaled logits,
    the lowest index among equals. loss and lse are differentiable, together or alone. lse and predicted depend on the
    logits alone, so they are given for ignored rows too. log p(target) is −loss where no other option is set.

    Returns:
        RowOutputs(loss, lse, predicted) in target's shape (its rows): float32 (float64 for float64 input), int64.

    Raises:
        TypeError, ValueError, IndexError: as `cross_entropy`.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]])
        >>> rows = cross_entropy_rows(logits, torch.tensor([0, 1]))
        >>> (rows.predicted == torch.tensor([0, 1])).float().mean()
        tensor(0.5000)

    Source: the contract in `ce_kernels.spec`.
    """
    options = Options.checked(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    rows = _rows(input, target, weight, options, dim, implementation)
    loss, lse, predicted = _row_losses(rows, with_argmax=True)
    return RowOutputs(loss.view(rows.shape), lse.view(rows.shape), predicted.long().view(rows.shape))


class _Rows(NamedTuple):
    """Checked arguments as rows [N, V] with the classes contiguous, and the shape of the rows in the user's arrays."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    options: Options
    shape: torch.Size
    implementation: str


def _rows(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    dim: int | None,
    implementation: str | None,
) -> _Rows:
    logits_facts, target_facts = _facts("input", input), _facts("target", target)
    axis = check_logits(logits_facts, min(1, input.ndim - 1) if dim is None else dim)
    soft = check_target(logits_facts, target_facts, axis, options)
    n_classes = input.shape[axis]
    if weight is not None:
        check_weight(_facts("weight", weight), n_classes)
        weight = weight.contiguous()
    for name, other in (("target", target), ("weight", weight)):
        if other is not None and other.device != input.device:
            passed = f"{name} on {other.device} with input on {input.device}"
            fail(ValueError, passed, "one device", f"{name}.to(input.device)")
    rows = _class_rows(target, axis) if soft else _index_rows(target)
    if not soft:
        options = options.for_labels(_facts("target", rows).dtype)
        if target.device.type == "cpu":
            _check_labels(rows, n_classes, options)
    return _Rows(
        _class_rows(input, axis),
        rows,
        weight,
        options,
        input.shape[:axis] + input.shape[axis + 1 :],
        choose_implementation(implementation, input.device),
    )


def _class_rows(array: Tensor, axis: int) -> Tensor:
    rows = array.movedim(axis, -1).reshape(-1, array.shape[axis])
    # A kernel walks a row with unit stride.
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _index_rows(target: Tensor) -> Tensor:
    # Narrow and unsigned integers cannot hold a negative ignore_index.
    return target.reshape(-1).to(target.dtype if target.dtype in (torch.int32, torch.int64) else torch.int64)


def _facts(name: str, value: Tensor) -> Facts:
    if not isinstance(value, Tensor):
        fail(TypeError, f"{name} of type {type(value).__name__}", "a torch.Tensor", f"torch.as_tensor({name})")
    return Facts(name, tuple(value.shape), str(value.dtype).removeprefix("torch."))


def _check_labels(target: Tensor, n_classes: int, options: Options) -> None:
    bad = ((target < 0) | (target >= n_classes)) & _counted(target, options)
    if bad.any():
        label_error("target", int(target[bad][0]), n_classes)


def _counted(target: Tensor, options: Options) -> Tensor:
    if options.ignore_index is None:
        return torch.ones_like(target, dtype=torch.bool)
    return target != options.ignore_index


def _row_losses(rows: _Rows, *, with_argmax: bool) -> tuple[Tensor, Tensor, Tensor]:
    return RowLosses.apply(rows.logits, rows.target, rows.weight, rows.options, rows.implementation, with_argmax)


def _divisor(rows: _Rows, denominator: float | Tensor | None) -> Tensor:
    """The 0-d divisor of `mean`, on the device, without reading it."""
    dtype, device = compute_dtype(rows.logits), rows.logits.device
    if isinstance(denominator, Tensor):
        check_denominator(_facts("denominator", denominator))
        if denominator.device.type not in ("cpu", device.type):
            passed = f"denominator on {denominator.device} with input on {device}"
            fail(ValueError, passed, "one device", "denominator.to(input.device)")
        return denominator.reshape(()).to(device=device, dtype=dtype, non_blocking=True)
    if denominator is not None:
        if not is_number(denominator):
            denominator_error(denominator)
        return torch.full((), denominator, dtype=dtype, device=device)
    if rows.target.is_floating_point():
        return torch.full((), len(rows.logits), dtype=dtype, device=device)
    counted = _counted(rows.target, rows.options)
    if rows.weight is None:
        return counted.sum(dtype=dtype)
    label = rows.target.long()
    valid = (label >= 0) & (label < rows.logits.shape[-1])
    # An invalid label makes the mean NaN by its loss; counted as 1, it leaves the other rows' gradients finite.
    mass = torch.where(valid, rows.weight.to(dtype)[torch.where(valid, label, 0)], 1.0)
    return torch.where(counted, mass, 0.0).sum()
