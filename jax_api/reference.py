"""The contract in plain jax.numpy: the implementation off the GPU, and the rule of second derivatives.

`stats` and `grad` mirror the kernels: logits [..., V], target [...] or [..., V], weight [V], row vectors [...], the
formula of `ce_kernels.spec`. Both are differentiable by JAX. Hard labels are soft targets t = onehot(label). `part`
says which slice of the vocabulary the logits are; statistics are the slice's own, or with `names` those of all slices.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ce_kernels import Options
from jax_api.static import Part, Static, Stats


class Upstream(NamedTuple):
    """What the gradient of rows needs besides the logits: statistics, upstream gradients of loss and lse (None: 0)."""

    lse: Array
    target_sum: Array
    dloss: Array
    dlse: Array | None


def compute_dtype(logits: Array) -> jnp.dtype:
    """fp64 for fp64 logits, fp32 for every other dtype."""
    return jnp.promote_types(logits.dtype, jnp.float32)


def is_soft(target: Array) -> bool:
    """Whether target holds probabilities rather than class indices."""
    return jnp.issubdtype(target.dtype, jnp.floating)


def stats(
    static: Static,
    logits: Array,
    target: Array,
    weight: Array | None,
    part: Part,
    names: tuple[str, ...] = (),
) -> Stats:
    """loss, lse, s = Σq and (with_argmax) argmax per row; lse of ignored rows is 0 unless with_argmax."""
    options = static.options
    r = logits.astype(compute_dtype(logits))
    x, _ = _transform(r, options)
    t, ignored, invalid = _targets(target, x, options, part)
    if not static.with_argmax:
        x = jnp.where(ignored[..., None], 0.0, x)
    q = _mass(t, weight, options, part)
    m = lax.stop_gradient(x).max(-1, keepdims=True)
    m = lax.pmax(m, names) if names else m
    m = jnp.where(m == -jnp.inf, 0.0, m)
    # Against the row's maximum, so that a confident row keeps its small loss; no 0·∞ at masked classes.
    distance = m - jnp.where((x == -jnp.inf) & (q == 0), m, x)
    d, s, loss = jnp.exp(x - m).sum(-1), q.sum(-1), (q * distance).sum(-1)
    d, s, loss = lax.psum((d, s, loss), names) if names else (d, s, loss)
    log_d = jnp.log(d)
    loss = loss + s * jnp.where((s == 0) & (log_d == -jnp.inf), 0.0, log_d)
    lse = m.squeeze(-1) + log_d
    if options.z_loss:
        loss = loss + options.z_loss * lse * lse
    # A factor, so that every derivative of an invalid row is NaN too.
    poison = jnp.where(invalid, jnp.nan, 1.0)
    loss, s = jnp.where(ignored, 0.0, loss * poison), jnp.where(ignored, 0.0, s * poison)
    if not static.with_argmax:
        return Stats(loss, jnp.where(ignored, 0.0, lse), s, None)
    return Stats(loss, lse, s, predicted_key(r, options).argmax(-1).astype(jnp.int32))


def predicted_key(r: Array, options: Options) -> Array:
    """What argmax compares: scaled logits before the soft cap, which rounds large logits to ties."""
    return jnp.where(r == -jnp.inf, -jnp.inf, r * options.logit_scale)


def grad(
    options: Options,
    logits: Array,
    target: Array,
    weight: Array | None,
    upstream: Upstream,
    part: Part,
    skip_zero: bool = True,
) -> tuple[Array, Array | None]:
    """dlogits = slope·(a·p − b·q), and of soft targets dtarget = b·(1−α)·w·(lse − x), each in its input's dtype.

    skip_zero: a row without upstream gradient has none, whatever it holds. It cuts the derivative by the upstream
    gradient at 0, so second derivatives go without it.
    """
    lse, target_sum, dloss, dlse = upstream
    r = logits.astype(lse.dtype)
    x, slope = _transform(r, options)
    t, ignored, _ = _targets(target, x, options, part)
    b = jnp.where(ignored, 0.0, dloss)
    a = b * (target_sum + 2.0 * options.z_loss * lse)
    if skip_zero:
        a = jnp.where(b == 0, 0.0, a)
    if dlse is not None:
        a = a + dlse
    q = jnp.where(x == -jnp.inf, 0.0, _mass(t, weight, options, part))
    dlogits = a[..., None] * jnp.exp(x - lse[..., None]) - b[..., None] * q
    if slope is not None:
        dlogits = dlogits * slope
    if skip_zero:
        dlogits = jnp.where(((a == 0) & (b == 0))[..., None], 0.0, dlogits)
    dlogits = dlogits.astype(logits.dtype)
    if not is_soft(target):
        return dlogits, None
    coefficient = b[..., None] * (1.0 - options.label_smoothing)
    if weight is not None:
        coefficient = coefficient * weight.astype(x.dtype)
    skip = (coefficient == 0) & (skip_zero | (x == -jnp.inf))
    dtarget = coefficient * jnp.where(skip, 0.0, lse[..., None] - x)
    return dlogits, dtarget.astype(target.dtype)


def weight_grad(
    options: Options,
    logits: Array,
    target: Array,
    weight: Array,
    lse: Array,
    dloss: Array,
    part: Part,
) -> Array:
    """dweight_k = Σ_rows dloss·((1−α)·t_k + α/V)·(lse − x_k), for rows that `without_dead_rows` has made safe."""
    x, _ = _transform(logits.astype(lse.dtype), options)
    t, ignored, invalid = _targets(target, x, options, part)
    q = _mass(t, None, options, part) * jnp.where(invalid, jnp.nan, 1.0)[..., None]
    b = jnp.where(ignored, 0.0, dloss)[..., None]
    # No 0·∞ at masked classes without target mass, nor in rows that are ignored.
    distance = jnp.where(((x == -jnp.inf) & (q == 0)) | ignored[..., None], 0.0, lse[..., None] - x)
    return (b * q * distance).sum(range(x.ndim - 1)).astype(weight.dtype)


def without_dead_rows(
    static: Static,
    logits: Array,
    target: Array,
    weight: Array | None,
    upstream: tuple[Array, Array | None],
    part: Part,
) -> tuple[Array, Array]:
    """logits and target with 0 in rows without upstream gradient whose loss or lse is not finite: 0·NaN is NaN."""
    dloss, dlse = upstream
    out = lax.stop_gradient(stats(replace(static, with_argmax=True), logits, target, weight, part, static.axis_name))
    hard = not is_soft(target)
    ignored = ignored_rows(target, static.options)
    dead = ((dloss == 0) | ignored) & ~(jnp.isfinite(out.loss) & jnp.isfinite(out.lse))
    if dlse is not None:
        dead &= dlse == 0
    safe = jnp.where(dead & ~ignored, 0, target) if hard else jnp.where(dead[..., None], 0.0, target)
    return jnp.where(dead[..., None], 0.0, logits), safe.astype(target.dtype)


def ignored_rows(target: Array, options: Options) -> Array:
    """Which rows carry ignore_index; none with soft targets."""
    if is_soft(target):
        return jnp.zeros(target.shape[:-1], bool)
    if options.ignore_index is None:
        return jnp.zeros_like(target, bool)
    return target == options.ignore_index


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


def _targets(target: Array, x: Array, options: Options, part: Part) -> tuple[Array, Array, Array]:
    """The target distribution t [..., V] and per row whether its label is ignored, and whether it is invalid."""
    ignored = ignored_rows(target, options)
    if is_soft(target):
        return target.astype(x.dtype), ignored, ignored
    column = target if part.start is None else target - part.start[0].astype(target.dtype)
    invalid = ~((target >= 0) & (target < part.total)) & ~ignored
    return jax.nn.one_hot(column, x.shape[-1], dtype=x.dtype), ignored, invalid


def _mass(t: Array, weight: Array | None, options: Options, part: Part) -> Array:
    """q = w·((1−α)·t + α/V)."""
    q = t
    if options.label_smoothing:
        q = (1.0 - options.label_smoothing) * q + options.label_smoothing / part.total
    return q if weight is None else q * weight.astype(t.dtype)
