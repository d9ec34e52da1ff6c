"""Which logits may be given away: `donate_logits` lets their gradient overwrite them."""

import torch
from torch import Tensor

from ce_kernels.spec import fail
from torch_api import layout, tracing


def check(logits: Tensor) -> None:
    """Raises ValueError or RuntimeError for logits that somebody else is known to need, or that cannot be written."""
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return
    keep = "donate_logits=False"
    if not tracing.is_eager(logits):
        fail(
            RuntimeError,
            "donate_logits=True under torch.compile, torch.func or a tensor subclass",
            "eager autograd: a tracer plans memory itself",
            keep,
        )
    base = logits._base
    if logits.is_leaf or (base is not None and base.is_leaf):
        # A leaf that needs no gradient may be the base of none that does.
        what = "a leaf" if logits.is_leaf else "a view of a leaf"
        fail(ValueError, f"donate_logits=True for {what}", "logits that an operation made and nobody keeps", keep)
    if layout.overlaps(logits):
        fail(
            ValueError,
            "donate_logits=True for expanded or overlapping logits, whose rows share memory",
            "a place for every gradient",
            keep,
        )
