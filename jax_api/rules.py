"""Derivatives: custom_vjp over the row operations of `jax_api.launch`.

    row_losses      Stats of rows, for any upstream gradients of loss and lse: statistics, then gradient
    row_gradients   the backward of row_losses as an operation of its own, so that it can be differentiated again
    fused_rows      row_losses and row_gradients in one launch
    mean_loss       Σ loss / denominator with the gradient computed in the forward: the fast path of training

Second derivatives go through the plain operations of `jax_api.reference`, differentiated by JAX.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from ce_kernels import Options
from jax_api import launch, reference
from jax_api.launch import Stats


@dataclass(frozen=True)
class Static:
    """What a rule knows at trace time."""

    options: Options
    implementation: str | None
    with_argmax: bool = False


def _differentiable[R](function: Callable[..., R]) -> jax.custom_vjp[R]:
    return jax.custom_vjp(function, nondiff_argnums=(0,))  # pyright: ignore[reportReturnType]


@_differentiable
def row_losses(static: Static, logits: Array, target: Array, weight: Array | None) -> Stats:
    """loss, lse, s and argmax per row; loss and lse differentiable together or alone."""
    return launch.stats(logits, target, weight, static.options, static.implementation, with_argmax=static.with_argmax)


def _row_losses_fwd(static, logits, target, weight):
    out = row_losses(static, logits, target, weight)
    return out, (logits, target, weight, out.lse, out.target_sum)


def _row_losses_bwd(static, residuals, cotangents):
    logits, target, weight, lse, target_sum = residuals
    dloss = cotangents.loss
    dlogits, dtarget = row_gradients(static, logits, target, weight, lse, target_sum, dloss, cotangents.lse)
    return dlogits, dtarget, weight_gradient(static, logits, target, weight, dloss)


row_losses.defvjp(_row_losses_fwd, _row_losses_bwd)


@_differentiable
def row_gradients(static, logits, target, weight, lse, target_sum, dloss, dlse):
    """(dlogits, dtarget) per row; lse and target_sum count as functions of the logits. dtarget is None for labels."""
    return launch.grad(logits, target, weight, lse, target_sum, dloss, dlse, static.options, static.implementation)


def _row_gradients_fwd(static, logits, target, weight, lse, target_sum, dloss, dlse):
    out = row_gradients(static, logits, target, weight, lse, target_sum, dloss, dlse)
    return out, (logits, target, weight, dloss, dlse)


def _row_gradients_bwd(static, residuals, cotangents):
    logits, target, weight, dloss, dlse = residuals
    soft = jnp.issubdtype(target.dtype, jnp.floating)

    def plain(logits, soft_target, weight, dloss, dlse):
        labels = soft_target if soft else target
        logits, labels = reference.without_dead_rows(logits, labels, weight, dloss, dlse, static.options)
        # Ignored rows have an lse only where one was asked for.
        _, lse, target_sum, _ = reference.stats(logits, labels, weight, static.options, static.with_argmax)
        upstream = (lse, target_sum, dloss, dlse)
        return reference.grad(logits, labels, weight, *upstream, static.options, with_dtarget=soft, skip_zero=False)

    _, pull = jax.vjp(plain, logits, target if soft else None, weight, dloss, dlse)
    dlogits, dtarget, dweight, ddloss, ddlse = pull(cotangents)
    return dlogits, dtarget, dweight, None, None, ddloss, ddlse


row_gradients.defvjp(_row_gradients_fwd, _row_gradients_bwd)


@_differentiable
def fused_rows(static, logits, target, weight, denominator) -> tuple[Stats, Array]:
    """Statistics of rows, and dlogits of Σ loss / denominator, given for every row: denominator [N]."""
    return launch.fused(logits, target, weight, denominator, static.options, static.implementation)


def _fused_rows_fwd(static, logits, target, weight, denominator):
    return fused_rows(static, logits, target, weight, denominator), (logits, target, weight, denominator)


def _fused_rows_bwd(static, residuals, cotangents):
    logits, target, weight, denominator = residuals
    soft = jnp.issubdtype(target.dtype, jnp.floating)

    def unfused(logits, soft_target, weight, denominator):
        labels = soft_target if soft else target
        out = row_losses(static, logits, labels, weight)
        dlogits, _ = row_gradients(static, logits, labels, weight, out.lse, out.target_sum, 1.0 / denominator, None)
        return out, dlogits

    _, pull = jax.vjp(unfused, logits, target if soft else None, weight, denominator)
    return pull(cotangents)


fused_rows.defvjp(_fused_rows_fwd, _fused_rows_bwd)


@_differentiable
def mean_loss(static: Static, logits: Array, target: Array, weight: Array | None, denominator: Array) -> Array:
    """Σ loss / denominator. Without a gradient it is one read of the logits."""
    return row_losses(static, logits, target, weight).loss.sum() / denominator


def _mean_loss_fwd(static, logits, target, weight, denominator):
    out, dlogits = fused_rows(static, logits, target, weight, jnp.broadcast_to(denominator, logits.shape[:1]))
    loss = out.loss.sum() / denominator
    return loss, (dlogits, logits, target, weight, out.lse, out.target_sum, denominator, loss)


def _mean_loss_bwd(static, residuals, g):
    dlogits, logits, target, weight, lse, target_sum, denominator, loss = residuals
    dloss = jnp.broadcast_to(g / denominator, lse.shape)
    dtarget = None
    if jnp.issubdtype(target.dtype, jnp.floating):
        # Unused unless the soft targets are differentiated, and then removed by XLA.
        _, dtarget = row_gradients(static, logits, target, weight, lse, target_sum, dloss, None)
    dweight = weight_gradient(static, logits, target, weight, dloss)
    scaled = (dlogits.astype(g.dtype) * g).astype(dlogits.dtype)
    return scaled, dtarget, dweight, -g * loss / denominator


mean_loss.defvjp(_mean_loss_fwd, _mean_loss_bwd)


def weight_gradient(static: Static, logits: Array, target: Array, weight: Array | None, dloss: Array) -> Array | None:
    """dweight by plain operations, which XLA removes where class weights are not differentiated."""
    if weight is None:
        return None

    def plain(weight):
        safe, labels = reference.without_dead_rows(logits, target, weight, dloss, None, static.options)
        return (dloss * reference.stats(safe, labels, weight, static.options, with_argmax=False)[0]).sum()

    return jax.grad(plain)(weight)
