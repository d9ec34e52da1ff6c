"""The public functions. The formula they compute stands in `ce_kernels.spec`."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from ce_kernels import Options
from ce_kernels.checks import (
    Facts,
    check_denominator,
    check_logits,
    check_target,
    check_weight,
    denominator_error,
    is_number,
)
from ce_kernels.spec import Implementation, Reduction, check_reduction, fail
from jax_api.backend import choose_implementation
from jax_api.launch import vary, varying_axes
from jax_api.reference import compute_dtype, ignored_rows, is_soft
from jax_api.rules import in_reverse_mode, mean_loss, row_losses
from jax_api.sharding import aligned, label_weights
from jax_api.static import Static


class RowOutputs(NamedTuple):
    """Per-row results in the shape of the labels: loss and lse (both differentiable) and the argmax class (int32)."""

    loss: Array
    lse: Array
    predicted: Array


def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int = -1,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    denominator: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    implementation: Implementation | None = None,
) -> Array:
    r"""Softmax cross-entropy of logits for integer or soft labels, reduced, with z-loss, soft cap and logit scale.

    Per row of logits r, with α = label_smoothing, λ = z_loss, w the class weights (1 when absent), V classes::

        x = logit_scale · r                 with a softcap c:  x = c · tanh(logit_scale · r / c)
        q = w · ((1 − α) · t + α / V)       t = onehot(labels), or the row of soft labels
        ℓ = Σ_k q_k · (lse − x_k) + λ · lse²,   lse = log Σ_k exp(x_k)

    `none` returns ℓ; `sum` Σℓ; `mean` Σℓ / Σ w_label over rows that are not ignored (integer labels), Σℓ / rows (soft
    labels), or Σℓ / denominator.

    Args:
        logits: any shape, classes along `axis`; float16, bfloat16, float32 or float64.
        labels: class indices (integers, no JAX uint64) in the shape of logits without `axis`, or class probabilities in
            the shape of logits. Gradients flow to logits, to soft labels and to weight.
        weight: class weights [C], floating point.
        axis: the class axis.
        ignore_index: rows with this class index have loss 0 and no gradient. None ignores none.
        reduction: "none", "mean" or "sum".
        label_smoothing: α in [0, 1].
        z_loss: λ ≥ 0, in nats⁻¹: the weight of lse² (PaLM, arXiv:2204.02311).
        softcap: c > 0, or None (Gemma 2, arXiv:2408.00118). Masked classes (−inf) stay masked.
        logit_scale: an inverse temperature.
        denominator: replaces the divisor of `mean`; a number or an array of one element, traced or not.
        axis_name: inside `jax.shard_map`, the mesh axis or axes over which the classes are sharded. logits, weight and
            soft labels are then this device's slice, class indices those of the whole vocabulary, and the loss is the
            same on all these devices. `mean` is that of this device's rows: divide by the global count, `denominator`.
        implementation: "triton", "reference" or None to choose by platform when the program is lowered.

    Returns:
        The loss in nats: float32 (float64 for float64 logits); in labels' shape for `none`, else 0-d. An out-of-range
        class index makes its row's loss and gradient NaN.

    Raises:
        TypeError, ValueError: what was passed, what is required, what to write instead.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> logits = jnp.array([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]])
        >>> loss, dlogits = jax.value_and_grad(cross_entropy)(logits, jnp.array([0, -100]))
        >>> round(float(loss), 4)
        0.2413
        >>> dlogits[1].tolist()
        [0.0, 0.0, 0.0]

    Differs from `optax.softmax_cross_entropy_with_integer_labels`, which returns ℓ per row and has none of the options:
    that is `jax_api.softmax_cross_entropy_with_integer_labels`. Source: the contract in `ce_kernels.spec`.
    """
    check_reduction(reduction, denominator)
    options = Options.checked(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    rows = _rows(logits, labels, weight, axis, options)
    names = _names(axis_name)
    static = Static(rows.options, choose_implementation(implementation), axis_name=names)
    if reduction == "none":
        arrays = aligned(rows.logits, rows.target, rows.weight, names)
        return in_reverse_mode(row_losses, static, *arrays).loss.reshape(rows.shape)
    divisor = jnp.ones((), compute_dtype(rows.logits)) if reduction == "sum" else _divisor(rows, denominator, names)
    arrays = aligned(rows.logits, rows.target, rows.weight, names, divisor)
    if names or rows.logits.dtype == jnp.float16:
        # Slices of the vocabulary must be merged before their gradient is known. fp16: loss scaling exists because
        # p / N is below its range, so round only after the upstream gradient is known.
        return in_reverse_mode(row_losses, static, *arrays).loss.sum() / divisor
    return in_reverse_mode(mean_loss, static, *arrays, vary(divisor, varying_axes(arrays[0])))


def cross_entropy_rows(
    logits: ArrayLike,
    labels: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int = -1,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    axis_name: str | tuple[str, ...] | None = None,
    implementation: Implementation | None = None,
) -> RowOutputs:
    r"""Per-row loss, lse and argmax in one read of the logits: log-probabilities, z-loss variants, accuracy, analysis.

    loss is ℓ of `cross_entropy` (same arguments); lse = log Σ_k exp(x_k); predicted = argmax_k of the scaled logits,
    the lowest index among equals. loss and lse are differentiable, together or alone. lse and predicted depend on the
    logits alone, so they are given for ignored rows too. log p(label) is −loss where no other option is set.

    Returns:
        RowOutputs(loss, lse, predicted) in labels' shape (its rows): float32 (float64 for float64 logits), int32.

    Raises:
        TypeError, ValueError: as `cross_entropy`.

    Example:
        >>> import jax.numpy as jnp
        >>> logits = jnp.array([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]])
        >>> rows = cross_entropy_rows(logits, jnp.array([0, 1]))
        >>> float((rows.predicted == jnp.array([0, 1])).mean())
        0.5

    Source: the contract in `ce_kernels.spec`.
    """
    options = Options.checked(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    rows = _rows(logits, labels, weight, axis, options)
    names = _names(axis_name)
    static = Static(rows.options, choose_implementation(implementation), with_argmax=True, axis_name=names)
    out = in_reverse_mode(row_losses, static, *aligned(rows.logits, rows.target, rows.weight, names))
    return RowOutputs(*(array.reshape(rows.shape) for array in (out.loss, out.lse, out.predicted)))  # pyright: ignore


class _Rows(NamedTuple):
    """Checked arguments, classes last and at least one leading axis, and the shape of the rows in the user's arrays."""

    logits: Array
    target: Array
    weight: Array | None
    options: Options
    shape: tuple[int, ...]


def _rows(logits: ArrayLike, labels: ArrayLike, weight: ArrayLike | None, axis: int, options: Options) -> _Rows:
    logits, labels = as_array("logits", logits), as_array("labels", labels)
    logits_facts = facts_of("logits", logits)
    axis = check_logits(logits_facts, axis)
    soft = check_target(logits_facts, facts_of("labels", labels), axis, options)
    n_classes = logits.shape[axis]
    if weight is not None:
        weight = as_array("weight", weight)
        check_weight(facts_of("weight", weight), n_classes)
    shape = logits.shape[:axis] + logits.shape[axis + 1 :]
    logits, target = jnp.moveaxis(logits, axis, -1), jnp.moveaxis(labels, axis, -1) if soft else _index_rows(labels)
    if not soft:
        options = options.for_labels(target.dtype.name)
    if not shape:
        logits, target = logits[None], target[None]
    return _Rows(logits, target, weight, options, shape)


def _index_rows(labels: Array) -> Array:
    # Narrow and unsigned integers cannot hold a negative ignore_index; int64 is int32 where x64 is off.
    wide = labels.dtype.itemsize >= 4 and labels.dtype != jnp.int32
    dtype = np.dtype(jax.dtypes.canonicalize_dtype(np.int64)) if wide else np.dtype(np.int32)
    if jnp.iinfo(labels.dtype).max > jnp.iinfo(dtype).max:
        # A label too large for it stays out of range, where wrapping would make it a class or ignore_index.
        labels = jnp.minimum(labels, labels.dtype.type(jnp.iinfo(dtype).max))
    return labels.astype(dtype)


def _names(axis_name: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if axis_name is None:
        return ()
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        fail(TypeError, f"axis_name={axis_name!r}", "a mesh axis name, or a tuple of them", "axis_name='model'")
    manual = jax.sharding.get_abstract_mesh().manual_axes
    missing = [name for name in names if name not in manual]
    if missing:
        fail(
            ValueError,
            f"axis_name={axis_name!r} where the manual mesh axes are {list(manual)}",
            "mesh axes of a jax.shard_map around the call, over which the classes of the logits are sharded",
            "axis_name=None outside of shard_map: jit needs no help with sharded logits",
        )
    return names


def as_array(name: str, value: ArrayLike) -> Array:
    if not isinstance(value, (jax.Array, np.ndarray, np.generic)):
        fail(TypeError, f"{name} of type {type(value).__name__}", "a JAX or NumPy array", f"jnp.asarray({name})")
    if isinstance(value, np.ndarray | np.generic) and value.dtype in (np.int64, np.uint64):
        # Without x64 JAX would wrap them; clipped, labels beyond int32 stay out of range.
        limits = jnp.iinfo(jax.dtypes.canonicalize_dtype(np.int64))
        value = np.clip(value, max(limits.min, np.iinfo(value.dtype).min), limits.max).astype(np.int64)
    return jnp.asarray(value)


def facts_of(name: str, value: Array) -> Facts:
    return Facts(name, value.shape, value.dtype.name)


def _divisor(rows: _Rows, denominator: ArrayLike | None, names: tuple[str, ...]) -> Array:
    """The 0-d divisor of `mean`."""
    dtype = compute_dtype(rows.logits)
    if denominator is not None:
        if not is_number(denominator):
            if not isinstance(denominator, (jax.Array, np.ndarray)):
                denominator_error(denominator)
            denominator = as_array("denominator", denominator)
            check_denominator(facts_of("denominator", denominator))
        return jnp.asarray(denominator, dtype).reshape(())
    if is_soft(rows.target):
        return jnp.full((), math.prod(rows.shape), dtype)
    mass = jnp.ones((), dtype)
    if rows.weight is not None:
        total = rows.logits.shape[-1] * (lax.axis_size(names) if names else 1)
        valid = (rows.target >= 0) & (rows.target < total)
        # An invalid label makes the mean NaN by its loss; counted as 1, it leaves the other rows' gradients finite.
        mass = jnp.where(valid, label_weights(rows.weight.astype(dtype), rows.target, names), 1.0)
    return jnp.where(ignored_rows(rows.target, rows.options), 0.0, mass).sum().astype(dtype)
