"""The public functions. The formula they compute stands in `ce_kernels.spec`."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ce_kernels.spec import Implementation, Reduction, check_reduction, fail
from torch_api import donation, launch, reductions, tracing
from torch_api.arguments import Choices, checked, divisor
from torch_api.reference import compute_dtype
from torch_api.rows import Inputs, Reducing, RowSpec
from torch_api.rules import FusedLoss, needs_graph, row_losses

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
    donate_logits: bool = False,
    process_group: "ProcessGroup | None" = None,
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
        donate_logits: lets the gradient overwrite input in the backward: half the memory, and one more read of input,
            which must not be read afterwards. Without a gradient nothing is overwritten.
        process_group: input, probabilities and weight are this process's slice of the classes, the slices of one size
            in the order of ranks; class indices count the whole vocabulary, and the loss is the same on every process.

    Returns:
        The loss in nats: float32 (float64 for float64 input); in target's shape for `none`, else 0-d. Out-of-range
        class indices raise in eager calls on the CPU; on a device, under torch.compile and under torch.func they make
        their row's loss and gradient NaN.

    Raises:
        TypeError, ValueError: what was passed, what is required, what to write instead.
        IndexError: an out-of-range class index, where finding it needs no device synchronisation.
        RuntimeError: at the call, for donated logits under a tracer or torch.func; in backward, where they are needed
            again; second derivatives of a sharded vocabulary.

    A DTensor in any sharding gives a DTensor: rows sharded as those of input, or a replicated scalar.

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
    if has_torch_function_variadic(input, target, weight):
        return _overridden(cross_entropy, locals())
    choices = Choices(ignore_index, label_smoothing, z_loss, softcap, logit_scale, dim, implementation)
    check_reduction(reduction, denominator)
    if process_group is not None or tracing.is_dtensor(input):
        reducing = Reducing(reduction, denominator, donate_logits, process_group)
        return _sharded(input, process_group).cross_entropy(input, target, weight, choices, reducing)
    inputs, spec = checked(input, target, weight, choices)
    if donate_logits:
        donation.check(inputs.logits)
    if reduction == "none":
        return row_losses(inputs, spec, donate=donate_logits).loss
    eager = tracing.is_eager(*inputs)
    trains = eager and torch.is_grad_enabled() and inputs.logits.requires_grad
    if eager and reduction == "mean" and denominator is None and not needs_graph(inputs):
        return _mean_without_gradient(inputs, spec)
    by = 1.0 if reduction == "sum" else divisor(inputs, spec, denominator)
    # Donated logits stay what they are until the backward: a use made later runs its own backward before.
    if trains and not donate_logits and _fuses(inputs, by):
        dtype = compute_dtype(inputs.logits)
        by = by if isinstance(by, Tensor) else torch.full((), by, dtype=dtype, device=input.device)
        return FusedLoss.apply(*inputs, by, spec)
    total = row_losses(inputs, spec, donate=donate_logits).loss.sum()
    return total if reduction == "sum" else total / by


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
    process_group: "ProcessGroup | None" = None,
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
    if has_torch_function_variadic(input, target, weight):
        return RowOutputs(*_overridden(_rows_as_tuple, locals()))
    choices = Choices(ignore_index, label_smoothing, z_loss, softcap, logit_scale, dim, implementation)
    if process_group is not None or tracing.is_dtensor(input):
        front = _sharded(input, process_group)
        return RowOutputs(*front.cross_entropy_rows(input, target, weight, choices, process_group))
    inputs, spec = checked(input, target, weight, choices)
    out = row_losses(inputs, spec, with_argmax=True)
    assert out.predicted is not None
    return RowOutputs(out.loss, out.lse, out.predicted.long())


def _rows_as_tuple(*tensors: Tensor, **options) -> tuple[Tensor, ...]:
    # `__torch_function__` rebuilds what a function returns, and cannot rebuild a NamedTuple.
    return tuple(cross_entropy_rows(*tensors, **options))


def _sharded(input: Tensor, process_group: "ProcessGroup | None"):
    """Who has the rule for classes that are spread over processes; torch.distributed is loaded for those alone."""
    if not tracing.is_dtensor(input):
        from torch_api import distributed

        return distributed
    from torch_api import dtensor

    if process_group is not None:
        passed = "process_group with a DTensor"
        fail(ValueError, passed, "one of them: a DTensor knows its own groups", "process_group=None")
    return dtensor


def _overridden(function, arguments: dict):
    """The call as tensor subclasses with `__torch_function__` want it."""
    input, target, weight = (arguments.pop(name) for name in ("input", "target", "weight"))
    return handle_torch_function(function, (input, target, weight), input, target, weight, **arguments)


def _fuses(inputs: Inputs, by: float | Tensor) -> bool:
    """Whether loss and gradient are one launch: the gradient of the logits is the only one, and may be rounded now."""
    others = (inputs.target, inputs.weight, by)
    return (
        # Loss scaling exists because p / N is below fp16's range: round only after the upstream gradient is known.
        inputs.logits.dtype != torch.float16
        and not [other for other in others if isinstance(other, Tensor) and other.requires_grad]
    )


def _mean_without_gradient(inputs: Inputs, spec: RowSpec) -> Tensor:
    """`mean` where no gradient is asked for: the launch has summed what it divides by."""
    out = launch.stats(inputs, spec, with_argmax=False)
    if inputs.target.is_floating_point():
        return out.loss.sum() / (inputs.target.numel() // inputs.target.shape[-1])
    if spec.options.label_smoothing:
        return out.loss.sum() / divisor(inputs, spec, None)
    # s = Σq of a hard label is its weight: 0 where it is ignored, NaN where it is invalid, as is the loss.
    return reductions.ratio(out.loss, out.target_sum, spec)
