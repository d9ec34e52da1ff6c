"""The module form of `torch_api.linear_cross_entropy`."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ce_kernels import Options
from ce_kernels.linear import MAX_LOGITS_BYTES, Accumulation, check_chunking
from ce_kernels.spec import Implementation, Reduction, check_implementation, check_reduction
from torch_api.linear import linear_cross_entropy
from torch_api.module import changed_options

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LinearCrossEntropyLoss(nn.Module):
    """`linear_cross_entropy` as a module: a criterion that is called with hidden states and the head's own weight.

    class_weight is a buffer: it moves with the module and is part of its state_dict. Options are checked here, arrays
    at the call. `forward` takes a denominator too, for one that changes from step to step.

    Example:
        >>> import torch
        >>> head = torch.nn.Linear(8, 100, bias=False)
        >>> criterion = LinearCrossEntropyLoss(softcap=30.0)
        >>> criterion
        LinearCrossEntropyLoss(softcap=30.0)
        >>> loss = criterion(torch.zeros(2, 5, 8), head.weight, torch.zeros(2, 5, dtype=torch.long))
        >>> round(loss.item(), 4)
        4.6052
    """

    class_weight: Tensor | None

    def __init__(
        self,
        class_weight: Tensor | None = None,
        *,
        ignore_index: int | None = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        denominator: float | None = None,
        max_logits_bytes: int = MAX_LOGITS_BYTES,
        accumulation: Accumulation = "float32",
        implementation: Implementation | None = None,
    ) -> None:
        super().__init__()
        check_reduction(reduction, denominator)
        check_implementation(implementation)
        check_chunking(max_logits_bytes, accumulation)
        Options.checked(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
        self.register_buffer("class_weight", class_weight)
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.denominator = denominator
        self.max_logits_bytes = max_logits_bytes
        self.accumulation: Accumulation = accumulation
        self.implementation: Implementation | None = implementation

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None = None,
        *,
        denominator: float | Tensor | None = None,
        process_group: "ProcessGroup | None" = None,
    ) -> Tensor:
        """The loss of `hidden @ weight.T + bias` for labels; denominator replaces the module's own."""
        return linear_cross_entropy(
            hidden,
            weight,
            labels,
            bias,
            self.class_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            denominator=self.denominator if denominator is None else denominator,
            max_logits_bytes=self.max_logits_bytes,
            accumulation=self.accumulation,
            process_group=process_group,
            implementation=self.implementation,
        )

    def extra_repr(self) -> str:
        """The options that differ from their defaults."""
        return changed_options(self, LinearCrossEntropyLoss)
