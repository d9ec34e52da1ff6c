"""Derivatives: custom rules over the row operations of `jax_api.sharding`.

    row_losses      Stats of rows, for any upstream gradients of loss and lse: statistics, then gradient
    row_gradients   the backward of row_losses as an operation of its own, so that it can be differentiated again
    fused_rows      row_losses and row_gradients in one launch
    mean_loss       Σ loss / denominator with the gradient computed in the forward: the fast path of training, and a
                    custom_jvp, as a gradient that is known already serves forward mode and reverse mode alike

Second derivatives go through the plain operations of `jax_api.reference`, differentiated by JAX.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from ce_kernels.spec import fail
from jax_api import reference, sharding
from jax_api.reference import Upstream, is_soft
from jax_api.slices import part_of, tracks_varying
from jax_api.static import Static, Stats


def _differentiable[R](function: Callable[..., R]) -> jax.custom_vjp[R]:
    return jax.custom_vjp(function, nondiff_argnums=(0,))  # pyright: ignore[reportReturnType]


@_differentiable
def row_losses(static: Static, logits: Array, target: Array, weight: Array | None) -> Stats:
    """loss, lse, s and argmax per row; loss and lse differentiable together or alone."""
    return sharding.stats(static, logits, target, weight)


def _row_losses_fwd(static, logits, target, weight):
    out = row_losses(static, logits, target, weight)
    return out, (logits, target, weight, out.lse, out.target_sum)


def _row_losses_bwd(static, residuals, cotangents):
    logits, target, weight, lse, target_sum = residuals
    dloss, dlse = (whole_cotangent(static, cotangent) for cotangent in (cotangents.loss, cotangents.lse))
    dlogits, dtarget = row_gradients(static, logits, target, weight, Upstream(lse, target_sum, dloss, dlse))
    return dlogits, dtarget, weight_gradient(static, logits, target, weight, dloss)


row_losses.defvjp(_row_losses_fwd, _row_losses_bwd)


@_differentiable
def row_gradients(static, logits, target, weight, upstream):
    """(dlogits, dtarget) per row; lse and target_sum count as functions of the logits. dtarget is None for labels."""
    return sharding.grad(static, logits, target, weight, upstream)


def _row_gradients_fwd(static, logits, target, weight, upstream):
    return row_gradients(static, logits, target, weight, upstream), (logits, target, weight, upstream)


def _row_gradients_bwd(static, residuals, cotangents):
    logits, target, weight, (_, _, dloss, dlse) = residuals
    soft = is_soft(target)
    names = static.axis_name

    def plain(logits, soft_target, weight, dloss, dlse):
        labels = soft_target if soft else target
        part = part_of(logits, names)
        logits, labels = reference.without_dead_rows(static, logits, labels, weight, (dloss, dlse), part)
        # With argmax for the lse of ignored rows: 0 · exp(x − lse), their gradient, has to be finite there.
        out = reference.stats(replace(static, with_argmax=True), logits, labels, weight, part, names)
        upstream = Upstream(out.lse, out.target_sum, dloss, dlse)
        return reference.grad(static.options, logits, labels, weight, upstream, part, skip_zero=False)

    _, pull = jax.vjp(plain, logits, target if soft else None, weight, dloss, dlse)
    dlogits, dtarget, dweight, ddloss, ddlse = pull(cotangents)
    return dlogits, dtarget, dweight, Upstream(None, None, ddloss, ddlse)  # pyright: ignore[reportArgumentType]


row_gradients.defvjp(_row_gradients_fwd, _row_gradients_bwd)


@_differentiable
def fused_rows(static, logits, target, weight, denominator) -> tuple[Stats, Array]:
    """Statistics of rows, and dlogits of Σ loss / denominator, given for every row: denominator [...]."""
    return sharding.fused(static, logits, target, weight, denominator)


def _fused_rows_fwd(static, logits, target, weight, denominator):
    return fused_rows(static, logits, target, weight, denominator), (logits, target, weight, denominator)


def _fused_rows_bwd(static, residuals, cotangents):
    logits, target, weight, denominator = residuals
    soft = is_soft(target)

    def unfused(logits, soft_target, weight, denominator):
        labels = soft_target if soft else target
        out = row_losses(static, logits, labels, weight)
        upstream = Upstream(out.lse, out.target_sum, 1.0 / denominator, None)
        return out, row_gradients(static, logits, labels, weight, upstream)[0]

    _, pull = jax.vjp(unfused, logits, target if soft else None, weight, denominator)
    return pull(cotangents)


fused_rows.defvjp(_fused_rows_fwd, _fused_rows_bwd)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def mean_loss(static: Static, logits: Array, target: Array, weight: Array | None, denominator: Array) -> Array:
    """Σ loss / denominator. Without a gradient it is one read of the logits."""
    return row_losses(static, logits, target, weight).loss.sum() / denominator


@partial(mean_loss.defjvp, symbolic_zeros=True)
def _mean_loss_jvp(static, primals, tangents):
    """A linear function of the tangents whose coefficients are the gradient: JAX transposes it for reverse mode."""
    logits, target, weight, denominator = primals
    dx, dt, dw, dd = tangents
    each = jnp.broadcast_to(denominator, logits.shape[:-1])
    out, dlogits = fused_rows(static, logits, target, weight, each)
    loss = out.loss.sum() / denominator
    slope = _inner(dlogits, dx, loss.dtype) + _inner(-loss / denominator, dd, loss.dtype)
    if is_soft(target) and not isinstance(dt, SymbolicZero):
        upstream = Upstream(out.lse, out.target_sum, 1.0 / each, None)
        slope += _inner(row_gradients(static, logits, target, weight, upstream)[1], dt, loss.dtype)
    if weight is not None and not isinstance(dw, SymbolicZero):
        slope += _inner(weight_gradient(static, logits, target, weight, 1.0 / each), dw, loss.dtype)
    return loss, slope


def _inner(coefficients, tangent, dtype):
    if isinstance(tangent, SymbolicZero):
        return jnp.zeros((), dtype)
    return (coefficients.astype(dtype) * tangent.astype(dtype)).sum()


def whole_cotangent(static: Static, cotangent: Array) -> Array:
    """The cotangent of a merged output: under shard_map(check_vma=False) each device brings its share of it."""
    return lax.psum(cotangent, static.axis_name) if _brings_shares(static) else cotangent


def own_share(static: Static, whole: Array) -> Array:
    """What a device brings of a value that all have whole, so that `whole_cotangent` sums to it."""
    return whole / lax.axis_size(static.axis_name) if _brings_shares(static) else whole


def _brings_shares(static: Static) -> bool:
    return bool(static.axis_name) and not tracks_varying(static.axis_name)


def weight_gradient(static: Static, logits: Array, target: Array, weight: Array | None, dloss: Array) -> Array | None:
    """dweight by plain operations, which XLA removes where class weights are not differentiated."""
    if weight is None:
        return None
    part = part_of(logits, static.axis_name)
    safe, labels = reference.without_dead_rows(static, logits, target, weight, (dloss, None), part)
    lse = reference.stats(static, safe, labels, weight, part, static.axis_name).lse
    return reference.weight_grad(static.options, safe, labels, weight, lse, dloss, part)


def in_reverse_mode[R](function: Callable[..., R], *arguments) -> R:
    """function of these rules on arguments; where forward mode meets a custom_vjp, an error says what to write instead.

    Under jit JAX finds out when it lowers, and says so itself.
    """
    try:
        return function(*arguments)
    except TypeError as error:
        if "forward-mode autodiff" not in str(error):
            raise
    fail(
        TypeError,
        "forward-mode differentiation (jax.jvp, jax.jacfwd, jax.hessian)",
        "reverse mode, or first derivatives of cross_entropy's reduction='mean' or 'sum'",
        "jax.vjp or jax.jacrev; jax.jacrev(jax.grad(f)) for a Hessian",
    )
