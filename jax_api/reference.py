"""The contract in plain jax.numpy: the implementation off the GPU, and the rule of second derivatives.

`stats` and `grad` mirror the kernels: rows [N, V], row vectors [N], the formula of `ce_kernels.spec`. Both are
differentiable by JAX. Hard labels are soft targets t = onehot(label).
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from ce_kernels import Options


def compute_dtype(logits: Array) -> jnp.dtype:
    """fp64 for fp64 logits, fp32 for every other dtype."""
    return jnp.promote_types(logits.dtype, jnp.float32)


def stats(
    logits: Array, target: Array, weight: Array | None, options: Options, with_argmax: bool
) -> tuple[Array, Array, Array, Array | None]:
    """loss, lse, s = Σq and (with_argmax) argmax per row; lse of ignored rows is 0 unless with_argmax."""
    r = logits.astype(compute_dtype(logits))
    x, _ = _transform(r, options)
    t, ignored, invalid = _targets(target, x, options)
    if not with_argmax:
        x = jnp.where(ignored[:, None], 0.0, x)
    q = _mass(t, weight, options)
    m = lax.stop_gradient(x.max(-1, keepdims=True))
    m = jnp.where(m == -jnp.inf, 0.0, m)
    log_d = jnp.log(jnp.exp(x - m).sum(-1))
    # Against the row's maximum, so that a confident row keeps its small loss; no 0·∞ at masked classes.
    distance = m - jnp.where((x == -jnp.inf) & (q == 0), m, x)
    s = q.sum(-1)
    loss = (q * distance).sum(-1) + s * jnp.where((s == 0) & (log_d == -jnp.inf), 0.0, log_d)
    lse = m.squeeze(-1) + log_d
    if options.z_loss:
        loss = loss + options.z_loss * lse * lse
    # A factor, so that every derivative of an invalid row is NaN too.
    poison = jnp.where(invalid, jnp.nan, 1.0)
    loss, s = jnp.where(ignored, 0.0, loss * poison), jnp.where(ignored, 0.0, s * poison)
    if not with_argmax:
        return loss, jnp.where(ignored, 0.0, lse), s, None
    key = jnp.where(r == -jnp.inf, -jnp.inf, r * options.logit_scale)
    return loss, lse, s, key.argmax(-1).astype(jnp.int32)


def grad(
    logits: Array,
    target: Array,
    weight: Array | None,
    lse: Array,
    target_sum: Array,
    dloss: Array,
    dlse: Array | None,
    options: Options,
    with_dtarget: bool,
    skip_zero: bool = True,
) -> tuple[Array, Array | None]:
    """dlogits = slope·(a·p − b·q), and (with_dtarget) dtarget = b·(1−α)·w·(lse − x), each in its input's dtype.

    skip_zero: a row without upstream gradient has none, whatever it holds. It cuts the derivative by the upstream
    gradient at 0, so second derivatives go without it.
    """
    r = logits.astype(lse.dtype)
    x, slope = _transform(r, options)
    t, ignored, _ = _targets(target, x, options)
    b = jnp.where(ignored, 0.0, dloss)
    a = b * (target_sum + 2.0 * options.z_loss * lse)
    if skip_zero:
        a = jnp.where(b == 0, 0.0, a)
    if dlse is not None:
        a = a + dlse
    q = jnp.where(x == -jnp.inf, 0.0, _mass(t, weight, options))
    dlogits = a[:, None] * jnp.exp(x - lse[:, None]) - b[:, None] * q
    if slope is not None:
        dlogits = dlogits * slope
    if skip_zero:
        dlogits = jnp.where(((a == 0) & (b == 0))[:, None], 0.0, dlogits)
    if not with_dtarget:
        return dlogits.astype(logits.dtype), None
    coefficient = b[:, None] * (1.0 - options.label_smoothing)
    if weight is not None:
        coefficient = coefficient * weight.astype(x.dtype)
    skip = (coefficient == 0) & (skip_zero | (x == -jnp.inf))
    dtarget = coefficient * jnp.where(skip, 0.0, lse[:, None] - x)
    return dlogits.astype(logits.dtype), dtarget.astype(target.dtype)


def without_dead_rows(
    logits: Array, target: Array, weight: Array | None, dloss: Array, dlse: Array | None, options: Options
) -> tuple[Array, Array]:
    """logits and target with 0 in rows without upstream gradient whose loss or lse is not finite: 0·NaN is NaN."""
    loss, lse, _, _ = lax.stop_gradient(stats(logits, target, weight, options, with_argmax=True))
    hard = not jnp.issubdtype(target.dtype, jnp.floating)
    ignored = (
        target == options.ignore_index if hard and options.ignore_index is not None else jnp.zeros_like(loss, bool)
    )
    dead = ((dloss == 0) | ignored) & ~(jnp.isfinite(loss) & jnp.isfinite(lse))
    if dlse is not None:
        dead &= dlse == 0
    safe = jnp.where(dead & ~ignored, 0, target) if hard else jnp.where(dead[:, None], 0.0, target)
    return jnp.where(dead[:, None], 0.0, logits), safe.astype(target.dtype)


def _transform(r: Array, options: Options) -> tuple[Array, Array | None]:
    """x = softcap·tanh(scale·r / softcap) and dx/dr (None: 1). A masked class (−inf) stays masked, with slope 0."""
    if options.logit_scale == 1.0 and options.softcap is None:
        return r, None
    masked = r == -jnp.inf
    x = jnp.where(masked, 0.0, r) * options.logit_scale
    slope = jnp.full_like(x, options.logit_scale)
    if options.softcap is not None:
        y = x / options.softcap
        # sech² through exp of a non-positive number: 1 − tanh² would lose all digits where tanh saturates.
        e = jnp.exp(-2.0 * jnp.abs(y))
        slope = slope * (4.0 * e / (1.0 + e) ** 2)
        x = options.softcap * jnp.tanh(y)
    return jnp.where(masked, -jnp.inf, x), jnp.where(masked, 0.0, slope)


def _targets(target: Array, x: Array, options: Options) -> tuple[Array, Array, Array]:
    """The target distribution t [N, V] and per row whether its label is ignored, and whether it is invalid."""
    n_rows, n_classes = x.shape
    if jnp.issubdtype(target.dtype, jnp.floating):
        no = jnp.zeros(n_rows, bool)
        return target.astype(x.dtype), no, no
    valid = (target >= 0) & (target < n_classes)
    ignored = target == options.ignore_index if options.ignore_index is not None else jnp.zeros_like(valid)
    return jax.nn.one_hot(target, n_classes, dtype=x.dtype), ignored, ~valid & ~ignored


def _mass(t: Array, weight: Array | None, options: Options) -> Array:
    """q = w·((1−α)·t + α/V)."""
    q = t
    if options.label_smoothing:
        q = (1.0 - options.label_smoothing) * q + options.label_smoothing / t.shape[-1]
    return q if weight is None else q * weight.astype(t.dtype)
