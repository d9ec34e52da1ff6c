"""Derivatives of a linear head: custom_vjp over the chunk loops of `jax_api.linear_sharding`.

    linear_rows   Stats of rows, for any upstream gradients of loss and lse: logits again in the backward
    linear_loss   Σ loss / denominator with the gradients computed in the forward: three matmuls in all

What is not differentiated is known when the rule is traced (symbolic zeros), and its matmul is never there. Second
derivatives go through `jax_api.cross_entropy_rows` of whole logits: they hold the logits.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from ce_kernels.spec import fail
from jax_api import linear_sharding
from jax_api.linear_chunks import Gradients, Head, LinearStatic, Wanted, logits_of
from jax_api.losses import cross_entropy_rows
from jax_api.reference import Upstream, is_soft
from jax_api.rules import own_share, whole_cotangent
from jax_api.static import Stats


def _differentiable[R](function: Callable[..., R], statics: int = 1) -> jax.custom_vjp[R]:
    return jax.custom_vjp(function, nondiff_argnums=tuple(range(statics)))  # pyright: ignore[reportReturnType]


@_differentiable
def linear_rows(static: LinearStatic, head: Head) -> Stats:
    """loss, lse, s and argmax per row; loss and lse differentiable together or alone."""
    return linear_sharding.stats(static, head)


def _linear_rows_fwd(static, head):
    head, wanted = _values_and_wanted(head)
    out = linear_rows(static, head)
    return out, (head, _as_arrays(wanted), out.lse, out.target_sum)


def _linear_rows_bwd(static, residuals, cotangents):
    head, flags, lse, target_sum = residuals
    dloss, dlse = _materialised(cotangents.loss, lse), cotangents.lse
    dloss = whole_cotangent(static.rows, dloss)
    dlse = None if isinstance(dlse, SymbolicZero) else whole_cotangent(static.rows, dlse)
    upstream = Upstream(lse, target_sum, dloss, dlse)
    return (_cotangents(row_gradients(static, _as_wanted(flags), head, upstream)),)


linear_rows.defvjp(_linear_rows_fwd, _linear_rows_bwd, symbolic_zeros=True)


def _row_gradients(static: LinearStatic, wanted: Wanted, head: Head, upstream: Upstream) -> Gradients:
    """The backward of linear_rows; lse and target_sum count as functions of the head."""
    return linear_sharding.grad(static, wanted, head, upstream)


row_gradients = _differentiable(_row_gradients, statics=2)


def _row_gradients_fwd(static, wanted, head, upstream):
    return row_gradients(static, wanted, head, upstream), (head, upstream.dloss, upstream.dlse)


def _row_gradients_bwd(static, wanted, residuals, cotangents):
    head, dloss, dlse = residuals
    soft = _soft_target(head)

    def plain(hidden, weight, bias, soft, dloss, dlse):
        target = head.target if soft is None else soft
        return _whole_gradients(static, wanted, Head(hidden, weight, bias, target, head.class_weight), dloss, dlse)

    _, pull = jax.vjp(plain, head.hidden, head.weight, head.bias, soft, dloss, dlse)
    *gradients, ddloss, ddlse = pull(cotangents)
    return _cotangents(Gradients(*gradients)), Upstream(None, None, ddloss, ddlse)  # pyright: ignore


row_gradients.defvjp(_row_gradients_fwd, _row_gradients_bwd)


def _fused_gradients(static: LinearStatic, wanted: Wanted, head: Head, denominator: Array) -> tuple[Stats, Gradients]:
    """linear_rows, and the gradients of Σ loss / denominator, in one loop."""
    return linear_sharding.fused(static, wanted, head, denominator)


fused_gradients = _differentiable(_fused_gradients, statics=2)


def _fused_gradients_fwd(static, wanted, head, denominator):
    return fused_gradients(static, wanted, head, denominator), (head, denominator)


def _fused_gradients_bwd(static, wanted, residuals, cotangents):
    head, denominator = residuals

    def unfused(hidden, weight, bias, soft, denominator):
        whole = Head(hidden, weight, bias, head.target if soft is None else soft, head.class_weight)
        out = linear_rows(static, whole)
        dloss = jnp.broadcast_to(1.0 / denominator, out.loss.shape)
        return out, row_gradients(static, wanted, whole, Upstream(out.lse, out.target_sum, dloss, None))

    _, pull = jax.vjp(unfused, head.hidden, head.weight, head.bias, _soft_target(head), denominator)
    *gradients, ddenominator = pull(cotangents)
    return _cotangents(Gradients(*gradients)), ddenominator


fused_gradients.defvjp(_fused_gradients_fwd, _fused_gradients_bwd)


@_differentiable
def linear_loss(static: LinearStatic, head: Head, denominator: Array) -> Array:
    """Σ loss / denominator. Without a gradient it is one matmul."""
    return linear_sharding.stats(static, head).loss.sum() / denominator


def _linear_loss_fwd(static, head, denominator):
    head, wanted = _values_and_wanted(head)
    denominator = denominator.value
    out, gradients = fused_gradients(static, wanted, head, denominator)
    loss = out.loss.sum() / denominator
    saved = [jnp.zeros(0) if x is None else x for x in gradients[:3]]
    return loss, (saved, _as_arrays(wanted), head, out.lse, out.target_sum, denominator, loss)


def _linear_loss_bwd(static, residuals, g):
    saved, flags, head, lse, target_sum, denominator, loss = residuals
    wanted = _as_wanted(flags)
    own = _materialised(g, loss)
    g = whole_cotangent(static.rows, own)
    kept = (wanted.hidden, wanted.weight, wanted.bias)
    scaled = [
        (x.astype(jnp.promote_types(x.dtype, g.dtype)) * g).astype(x.dtype) if keep else None
        for x, keep in zip(saved, kept, strict=True)
    ]
    dtarget = None
    if wanted.target:
        # A loop of its own: soft targets that are trained are rare.
        upstream = Upstream(lse, target_sum, jnp.broadcast_to(g / denominator, lse.shape), None)
        only_target = Wanted(hidden=False, weight=False, bias=False, target=True)
        dtarget = row_gradients(static, only_target, head, upstream).target
    # By the divisor, which devices have in common, each has its share.
    return _cotangents(Gradients(*scaled, target=dtarget)), -own * loss / denominator


linear_loss.defvjp(_linear_loss_fwd, _linear_loss_bwd, symbolic_zeros=True)


# Outside of jit, a call compiles once; and a shard_map outside of jit knows symbolic zeros only inside of a jit.
jitted_rows = jax.jit(linear_rows, static_argnums=0, inline=True)
jitted_loss = jax.jit(linear_loss, static_argnums=0, inline=True)


def _values_and_wanted(head: Head) -> tuple[Head, Wanted]:
    """The arrays of a head whose leaves say whether they are differentiated, and which are."""
    if head.class_weight is not None and head.class_weight.perturbed:  # pyright: ignore
        passed = "class_weight that is differentiated"
        fail(ValueError, passed, "class weights that are not trained", "jax.lax.stop_gradient(class_weight)")
    wanted = Wanted(*(x is not None and x.perturbed for x in head[:4]))  # pyright: ignore
    return Head(*(None if x is None else x.value for x in head)), wanted  # pyright: ignore


def _as_arrays(wanted: Wanted) -> tuple[Array, ...]:
    """Flags as shapes. JAX takes residuals to have one structure, whatever is differentiated; shapes may differ."""
    return tuple(jnp.zeros(int(want)) for want in (wanted.hidden, wanted.weight, wanted.bias, wanted.target))


def _as_wanted(flags: tuple[Array, ...]) -> Wanted:
    hidden, weight, bias, target = flags
    return Wanted(bool(hidden.size), bool(weight.size), bool(bias.size), bool(target.size))


def _materialised(cotangent: Array | SymbolicZero, like: Array) -> Array:
    return jnp.zeros_like(like) if isinstance(cotangent, SymbolicZero) else cotangent


def _cotangents(gradients: Gradients) -> Head:
    # None is zero.
    return Head(*gradients, None)  # pyright: ignore


def _soft_target(head: Head) -> Array | None:
    return head.target if is_soft(head.target) else None


def _whole_gradients(static: LinearStatic, wanted: Wanted, head: Head, dloss: Array, dlse: Array | None) -> Gradients:
    """The gradients of row_gradients by JAX through whole logits, differentiable again."""
    flags = (wanted.hidden, wanted.weight, wanted.bias, wanted.target)

    def total(chosen):
        given = iter(chosen)
        arrays: list[Any] = [next(given) if want else x for want, x in zip(flags, head[:4], strict=True)]
        hidden, weight, bias, target = arrays
        out = cross_entropy_rows(
            logits_of(static, hidden, weight, bias),
            target,
            head.class_weight,
            implementation="reference",
            axis_name=static.rows.axis_name or None,
            **asdict(static.rows.options),
        )
        loss = (out.loss * dloss).sum()
        return own_share(static.rows, loss if dlse is None else loss + (out.lse * dlse).sum())

    found = iter(jax.grad(total)([x for want, x in zip(flags, head[:4], strict=True) if want]))
    return Gradients(*(next(found) if want else None for want in flags))
