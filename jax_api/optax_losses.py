"""Optax's two softmax losses by name and signature, over the same kernels."""

import math

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from ce_kernels.checks import check_class_indices, check_logits
from ce_kernels.spec import fail
from jax_api.losses import as_array, cross_entropy, cross_entropy_rows, facts_of
from jax_api.reference import compute_dtype


def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike, labels: ArrayLike, axis: int | tuple[int, ...] = -1, where: ArrayLike | None = None
) -> Array:
    r"""Per-row softmax cross-entropy of integer labels: ℓ = log Σ_k exp(x_k) − x_label.

    Args:
        logits: floating point, any shape.
        labels: integers in the shape of logits without `axis`. With a tuple of axes, flat indices over those axes.
        axis: the class axis, or axes.
        where: elements to include, in the shape of the rows or of logits (an excluded class leaves the sum; an excluded
            row has loss 0).

    Returns:
        ℓ in nats in the shape of the rows: float32, float64 for float64 logits.

    Example:
        >>> import jax.numpy as jnp
        >>> logits = jnp.array([[1.2, -0.8, -0.5], [0.9, -1.2, 1.1]])
        >>> [round(float(loss), 4) for loss in softmax_cross_entropy_with_integer_labels(logits, jnp.array([0, 1]))]
        [0.2761, 2.9518]

    Differs from `optax.softmax_cross_entropy_with_integer_labels` on purpose: half-precision logits give a float32
    loss, and every label out of range gives NaN (Optax wraps negative ones to real classes).
    """
    logits, where, row_mask = _classes_last(jnp.asarray(logits), where, axis)
    check_class_indices(facts_of("labels", labels := as_array("labels", labels)))
    if where is None or row_mask:
        loss = cross_entropy(logits, labels, ignore_index=None, reduction="none")
        return loss if where is None else jnp.where(where, loss, 0.0)
    included = where.any(-1)
    # An excluded row keeps its logits: a row of only −inf has no finite gradient.
    masked = jnp.where(where | ~included[..., None], logits, -jnp.inf)
    lse = cross_entropy_rows(masked, labels, ignore_index=None).lse
    is_label = jnp.arange(logits.shape[-1]) == labels[..., None]
    # A sum rather than a gather, which would collect logits whose classes are sharded.
    label_logits = jnp.where(is_label, logits, 0.0).sum(-1, dtype=lse.dtype)
    valid = (labels >= 0) & (labels < logits.shape[-1])
    loss = jnp.where(valid, lse - label_logits, jnp.nan)
    return jnp.where(included, loss, 0.0)


def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | tuple[int, ...] | None = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Per-row softmax cross-entropy of label distributions: ℓ = Σ_k t_k · (log Σ_j exp(x_j) − x_k).

    Args:
        logits: floating point, any shape.
        labels: one-hot or soft labels, broadcastable to logits. They are differentiated too.
        axis: the class axis or axes; None means all.
        where: elements to include, in the shape of the rows or of logits.

    Returns:
        ℓ in nats in the shape of the rows: float32, float64 for float64 logits.

    Example:
        >>> import jax.numpy as jnp
        >>> logits = jnp.array([[1.2, -0.8, -0.5], [0.9, -1.2, 1.1]])
        >>> labels = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> [round(float(loss), 4) for loss in softmax_cross_entropy(logits, labels)]
        [0.2761, 2.9518]

    Differs from `optax.softmax_cross_entropy` on purpose: half-precision logits give a float32 loss, and a masked class
    (−inf) without target mass adds nothing, as in `optax.safe_softmax_cross_entropy`.
    """
    logits = jnp.asarray(logits)
    labels = jnp.broadcast_to(jnp.asarray(labels), logits.shape)
    if not jnp.issubdtype(labels.dtype, jnp.floating):
        labels = labels.astype(compute_dtype(logits))
    axis = tuple(range(logits.ndim)) if axis is None else axis
    logits, where, row_mask = _classes_last(logits, where, axis)
    labels, _, _ = _classes_last(labels, None, axis)
    included = None
    if where is not None:
        included = where if row_mask else where.any(-1)
        where = where[..., None] if row_mask else where
        labels = jnp.where(where, labels, 0.0)
        logits = jnp.where(where | ~included[..., None], logits, -jnp.inf)
    loss = cross_entropy(logits, labels, ignore_index=None, reduction="none")
    return loss if included is None else jnp.where(included, loss, 0.0)


def _classes_last(
    array: Array, where: ArrayLike | None, axis: int | tuple[int, ...]
) -> tuple[Array, Array | None, bool]:
    """array with its class axes flattened into the last one, where likewise, and whether where has one entry a row."""
    facts = facts_of("logits", array)
    axes = tuple(check_logits(facts, a) for a in (axis if isinstance(axis, tuple) else (axis,)))
    if len(set(axes)) != len(axes):
        fail(ValueError, f"class axes {axis} for {facts}", "different axes", "every axis once")
    order = tuple(a for a in range(array.ndim) if a not in axes) + axes
    rows = array.ndim - len(axes)

    def flatten(x: Array) -> Array:
        x = x.transpose(order)
        return x.reshape(*x.shape[:rows], math.prod(x.shape[rows:]))

    if where is None:
        return flatten(array), None, False
    where = jnp.asarray(where, bool)
    if where.ndim != array.ndim:
        return flatten(array), where, True
    return flatten(array), flatten(jnp.broadcast_to(where, array.shape)), False
