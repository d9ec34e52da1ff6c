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
        num_items_in_batch: a number or a tensor, never read by the host; with several elements, as `Trainer` repeats
            it for replicas, they are the same.
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
    logits = outputs["logits"] if isinstance(outputs, dict) else getattr(outputs, "logits", outputs)
    return cross_entropy(
        logits,
        _shifted(labels, ignore_index),
        dim=-1,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        denominator=_count(num_items_in_batch),
        donate_logits=donate_logits,
    )


def for_causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int | None = None,
    num_items_in_batch: float | Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    **_: Any,
) -> Tensor:
    """`causal_lm_loss` as transformers' models call theirs: `model.loss_function = for_causal_lm_loss`.

    Args:
        logits: [batch, time, classes], in the model's dtype.
        labels: [batch, time], not shifted; on another device they are moved.
        vocab_size: the number of classes, which must be that of the logits.
        num_items_in_batch: as in `causal_lm_loss`, and so are the options.
        ignore_index: labels to leave out.
        shift_labels: labels that are shifted already, instead of labels.
        label_smoothing: as in `torch_api.cross_entropy`, and so are the rest.
        z_loss: the weight of lse².
        softcap: c > 0, or None; for logits that the model has not capped.
        logit_scale: an inverse temperature.
        **_: what a model passes on from its caller, meant for its layers.

    Returns:
        The loss in nats, 0-d, float32 (float64 for float64 logits).

    Raises:
        TypeError: no labels. ValueError: logits of another number of classes. What `torch_api.cross_entropy` raises.

    Example:
        >>> import torch
        >>> logits, labels = torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]])
        >>> round(for_causal_lm_loss(logits=logits, labels=labels, vocab_size=4).item(), 4)
        1.3863

    Source: transformers' `ForCausalLMLoss`, which makes a float32 copy of the logits.
    """
    if vocab_size is not None and logits.shape[-1] != vocab_size:
        passed = f"vocab_size={vocab_size} with logits of {logits.shape[-1]} classes"
        fail(ValueError, passed, "the logits' number of classes", f"vocab_size={logits.shape[-1]}")
    if shift_labels is None:
        shift_labels = _shifted(labels, ignore_index)
    return cross_entropy(
        logits,
        shift_labels.to(logits.device).view(logits.shape[:-1]),
        dim=-1,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        denominator=_count(num_items_in_batch),
    )


def _count(num_items_in_batch: float | Tensor | None) -> float | Tensor | None:
    if isinstance(num_items_in_batch, Tensor) and num_items_in_batch.numel():
        return num_items_in_batch.flatten()[0]
    return num_items_in_batch


def _shifted(labels: Tensor | None, ignore_index: int) -> Tensor:
    if labels is None:
        fail(TypeError, "labels=None", "labels [batch, time]", "a data collator that makes labels")
    # Labels are shifted and logits are not: a slice of the logits would copy their gradient.
    return F.pad(labels[..., 1:], (0, 1), value=ignore_index)
