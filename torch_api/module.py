"""The module form of `torch_api.cross_entropy`."""

import inspect
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ce_kernels import Options
from ce_kernels.spec import Implementation, Reduction, check_implementation, check_reduction
from torch_api.losses import cross_entropy

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class CrossEntropyLoss(nn.Module):
    """`torch_api.cross_entropy` as a module, in place of `torch.nn.CrossEntropyLoss`; same formula, same arguments.

    weight is a buffer: it moves with the module and is part of its state_dict. Options are checked here, arrays at the
    call. `forward` takes a denominator too, for one that changes from step to step.

    Example:
        >>> import torch
        >>> criterion = CrossEntropyLoss(label_smoothing=0.1)
        >>> criterion
        CrossEntropyLoss(label_smoothing=0.1)
        >>> round(criterion(torch.zeros(2, 4), torch.tensor([0, 3])).item(), 4)
        1.3863
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int | None = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        denominator: float | None = None,
        dim: int | None = None,
        implementation: Implementation | None = None,
        donate_logits: bool = False,
    ) -> None:
        super().__init__()
        check_reduction(reduction, denominator)
        check_implementation(implementation)
        Options.checked(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.denominator = denominator
        self.dim = dim
        self.implementation: Implementation | None = implementation
        self.donate_logits = donate_logits

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        denominator: float | Tensor | None = None,
        process_group: "ProcessGroup | None" = None,
    ) -> Tensor:
        """The loss of logits `input` for `target`; denominator replaces the module's own."""
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            denominator=self.denominator if denominator is None else denominator,
            dim=self.dim,
            implementation=self.implementation,
            donate_logits=self.donate_logits,
            process_group=process_group,
        )

    def extra_repr(self) -> str:
        """The options that differ from their defaults."""
        return changed_options(self, CrossEntropyLoss)


def changed_options(module: nn.Module, kind: type[nn.Module]) -> str:
    """What a module's repr shows: the keyword arguments of its kind that differ from their defaults."""
    keywords = [p for p in inspect.signature(kind).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return ", ".join(f"{p.name}={getattr(module, p.name)!r}" for p in keywords if getattr(module, p.name) != p.default)
