"""The loss as trainers call it. Imports no trainer."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ce_kernels.spec import fail
from torch_api.losses import cross_entropy


def causal_lm_loss(
    outputs: Any,
    labels: Tensor | None,
    num_items_in_batch: float | Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    donate_logits: bool = False,
) -> Tensor:
    """Next-token loss of a language model: `Trainer(compute_loss_func=causal_lm_loss)` of Hugging Face transformers.

    Position t is scored against labels[:, t + 1]; Σ ℓ / num_items_in_batch, the count over all accumulated batches,
    so that accumulation is exact; without it the mean over labels that are not ignored. ℓ and the options are those of
    `torch_api.cross_entropy`; bind them with `functools.partial`. Logits are read as the model made them, in their
    dtype: no float32 copy, no shifted copy.

    Args:
        outputs: the model's output: an object with `logits`, a mapping with them, or the logits [batch, time, classes].
        labels: [batch, time], not shifted, as transformers has them.
        num_items_in_batch: a number or a tensor of one element, never read by the host.
        ignore_index: labels to leave out.
        label_smoothing: as in `torch_api.cross_entropy`, and so are the rest.
        z_loss: the weight of lse².
        softcap: c > 0, or None; for logits that the model has not capped.
        logit_scale: an inverse temperature.
        donate_logits: the gradient may overwrite the logits.

    Returns:
        The loss in nats, 0-d, float32 (float64 for float64 logits).

    Raises:
        TypeError: no labels. What `torch_api.cross_entropy` raises.

    Example:
        >>> import torch
        >>> logits, labels = torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]])
        >>> round(causal_lm_loss(logits, labels).item(), 4)
        1.3863
        >>> round(causal_lm_loss({"logits": logits}, labels, num_items_in_batch=4).item(), 4)
        0.6931

    Source: transformers' `ForCausalLMLoss`, in one launch.
    """
    if labels is None:
        fail(TypeError, "labels=None", "labels [batch, time]", "a data collator that makes labels")
    logits = outputs["logits"] if isinstance(outputs, dict) else getattr(outputs, "logits", outputs)
    # Labels are shifted and logits are not: a slice of the logits would copy their gradient.
    shifted = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
    return cross_entropy(
        logits,
        shifted,
        dim=-1,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        denominator=num_items_in_batch,
        donate_logits=donate_logits,
    )
