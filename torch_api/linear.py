"""Cross-entropy of a linear head without its logits. The formula stands in `ce_kernels.spec`."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ce_kernels import Options
from ce_kernels.linear import MAX_LOGITS_BYTES, Accumulation
from ce_kernels.spec import Implementation, Reduction, check_reduction
from torch_api import tracing
from torch_api.linear_arguments import LinearChoices, checked_head, divided_by
from torch_api.linear_chunks import Head
from torch_api.linear_ops import linear_loss
from torch_api.linear_rules import LinearLoss, linear_rows
from torch_api.losses import RowOutputs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    denominator: float | Tensor | None = None,
    max_logits_bytes: int = MAX_LOGITS_BYTES,
    accumulation: Accumulation = "float32",
    process_group: "ProcessGroup | None" = None,
    implementation: Implementation | None = None,
) -> Tensor:
    r"""`torch_api.cross_entropy(hidden @ weight.T + bias, labels, dim=-1)`, from chunks of logits.

    First derivatives never hold more than a chunk; second ones hold whole logits.

    `mean` and `sum` compute the gradients in the forward pass, with three matmuls in all; `none`, float16, and
    gradients of soft labels or of the denominator compute the logits again in the backward pass: four. A gradient that
    is not needed (a frozen head, a frozen body) costs no matmul; without any it is one matmul.

    Args:
        hidden: [..., D], float16, bfloat16, float32 or float64. A DTensor keeps its rows where they are; the loss is a
            DTensor, and the other arrays are DTensors on its mesh or, plain, the same on every process.
        weight: [V, D] as `nn.Linear` keeps it, in hidden's dtype. Under autocast hidden, weight and bias are cast to
            its dtype here, and gradients arrive in their own.
        labels: class indices [...] (integers), or class probabilities [..., V].
        bias: [V], or None.
        class_weight: [V], floating point: `weight` of `torch_api.cross_entropy`. It gets no gradient: ValueError.
        ignore_index: this and the options up to denominator, and implementation, are those of
            `torch_api.cross_entropy`, with the same formula.
        reduction: "none", "mean" or "sum".
        label_smoothing: α in [0, 1].
        z_loss: λ ≥ 0, the weight of lse².
        softcap: c > 0, or None.
        logit_scale: an inverse temperature.
        denominator: replaces the divisor of `mean`.
        max_logits_bytes: the most that a chunk of logits may take: rows are split into equal chunks, multiples of 128
            where that is possible. Chunks only change the rounding of the weight's gradient.
        accumulation: how the chunks of the gradients of weight are added up. "float32": in a float32 copy of it (which
            is the gradient itself where weight is float32). "parameter": in weight's dtype, with no copy; every chunk
            rounds the sum once, so bfloat16 gradients have about √((chunks + 1) / 2) times the error of one rounding.
        process_group: weight, bias, class_weight and soft labels are this process's slice of the classes, the slices of
            one size in the order of ranks; hidden and labels are whole on every process, and so is hidden's gradient.
        implementation: "triton", "reference" or None to choose by device.

    Returns:
        As `torch_api.cross_entropy` of logits in hidden's dtype: float32 (float64 for float64).

    Raises:
        TypeError, ValueError, IndexError: as `torch_api.cross_entropy`.
        RuntimeError: second derivatives with process_group.

    Example:
        >>> import torch
        >>> hidden = torch.eye(3, requires_grad=True)
        >>> weight = torch.zeros(4, 3, requires_grad=True)
        >>> loss = linear_cross_entropy(hidden, weight, torch.tensor([0, 3, -100]))
        >>> round(loss.item(), 4)
        1.3863
        >>> loss.backward()
        >>> weight.grad[0]
        tensor([-0.3750,  0.1250,  0.0000])

    Differs from `torch.nn.functional.linear_cross_entropy`: `class_weight` is its `weight`, the options above, leading
    axes, and second backwards and second derivatives are right. Source: the contract in `ce_kernels.spec`.
    """
    check_reduction(reduction, denominator)
    options = Options.checked(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    choices = LinearChoices(max_logits_bytes, accumulation, process_group, implementation)
    arrays = Head(hidden, weight, bias, labels, class_weight)
    if tracing.is_dtensor(hidden):
        from torch_api import linear_dtensor

        return linear_dtensor.cross_entropy(arrays, options, choices, reduction, denominator)
    head, static = checked_head(arrays, options, choices)
    if reduction == "none":
        return linear_rows(head, static, with_argmax=False)[0].view(hidden.shape[:-1])
    by = divided_by(head, static, 1.0 if reduction == "sum" else denominator)
    trained = [x for x in head[:3] if x is not None and x.requires_grad]
    if (
        torch.is_grad_enabled()
        and trained
        and not tracing.is_transformed()
        # Loss scaling exists because p / N is below fp16's range: round only after the upstream gradient is known.
        and static.dtype != torch.float16
        and not (head.target.requires_grad or by.requires_grad)
    ):
        # No Function where a program is compiled: its backward would not notice that it is to be differentiated again.
        return linear_loss(head, by, static) if torch.compiler.is_compiling() else LinearLoss.apply(*head, by, static)
    return linear_rows(head, static, with_argmax=False)[0].sum() / by


def linear_cross_entropy_rows(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    max_logits_bytes: int = MAX_LOGITS_BYTES,
    accumulation: Accumulation = "float32",
    process_group: "ProcessGroup | None" = None,
    implementation: Implementation | None = None,
) -> RowOutputs:
    r"""Per-row loss, lse and argmax of `hidden @ weight.T + bias`, without the logits: log-probabilities, RL, accuracy.

    The same as `torch_api.cross_entropy_rows` of the logits, with the arguments of `linear_cross_entropy`. loss and lse
    are differentiable, together or alone; the backward pass computes the logits again.

    Returns:
        RowOutputs(loss, lse, predicted) in the shape of the rows: float32 (float64 for float64), int64.

    Raises:
        TypeError, ValueError, IndexError: as `torch_api.cross_entropy`.

    Example:
        >>> import torch
        >>> rows = linear_cross_entropy_rows(torch.eye(2), torch.eye(2), torch.tensor([0, 0]))
        >>> [round(p, 4) for p in torch.exp(-rows.loss).tolist()], rows.predicted.tolist()
        ([0.7311, 0.2689], [0, 1])

    Source: the contract in `ce_kernels.spec`.
    """
    options = Options.checked(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    choices = LinearChoices(max_logits_bytes, accumulation, process_group, implementation)
    arrays = Head(hidden, weight, bias, labels, class_weight)
    if tracing.is_dtensor(hidden):
        from torch_api import linear_dtensor

        return RowOutputs(*linear_dtensor.cross_entropy_rows(arrays, options, choices))
    head, static = checked_head(arrays, options, choices)
    loss, lse, predicted = linear_rows(head, static, with_argmax=True)
    shape = hidden.shape[:-1]
    return RowOutputs(loss.view(shape), lse.view(shape), predicted.long().view(shape))
