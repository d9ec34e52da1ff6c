"""Derivatives of a linear head: autograd Functions over the operations of `torch_api.linear_ops`.

    LinearLoss        Σ loss / denominator with the gradients computed in the forward: three matmuls in all
    LinearRows        (loss, lse, predicted) of rows, for any upstream gradients: logits again in the backward
    LinearGradients   that backward as an operation of its own, so that it can be differentiated again

Second derivatives and forward mode go through `cross_entropy_rows` of whole logits: they hold the logits.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import linear

from ce_kernels.spec import fail
from torch_api import launch, tracing
from torch_api.batching import one_by_one
from torch_api.linear_chunks import Head, Static
from torch_api.linear_ops import linear_fused, linear_grad, linear_stats, scaled
from torch_api.losses import RowOutputs, cross_entropy_rows
from torch_api.rows import Upstream, or_zeros
from torch_api.rules import refuse_to_be_detached


class LinearLoss(Function):
    """Σ loss / denominator for a 0-d denominator."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, class_weight, denominator, static: Static):
        head = Head(hidden, weight, bias, target, class_weight)
        wanted = list(ctx.needs_input_grad[:3])
        loss, lse, target_sum, *gradients = linear_fused(head, denominator, static, wanted)
        ctx.save_for_backward(*head, denominator, lse, target_sum, *gradients)
        ctx.static, ctx.spent = static, False
        return loss.sum() / denominator

    @staticmethod
    def backward(ctx, g):
        *head, denominator, lse, target_sum, dhidden, dweight, dbias = ctx.saved_tensors
        saved = (dhidden, dweight, dbias)
        wanted = list(ctx.needs_input_grad[:3])
        compiling = torch.compiler.is_compiling()
        if not compiling and (torch.is_grad_enabled() or ctx.spent or tracing.is_batched(g)):
            # Under create_graph, or after a first backward gave its buffers away: compute the gradients anew.
            refuse_to_be_detached(g)
            dloss = (g / denominator).expand(len(lse))
            gradients = LinearGradients.apply(*head, lse, target_sum, dloss, None, ctx.static, [*wanted, False])[:3]
        elif tracing.is_opaque(g):
            gradients = [scaled(x, g) if want else None for x, want in zip(saved, wanted, strict=True)]
        else:
            ctx.spent = True
            # `.data`: their receiver may write to them (.grad accumulates in place) without invalidating this node.
            gradients = [x.data if want else None for x, want in zip(saved, wanted, strict=True)]
            for x in gradients:
                if x is not None:
                    launch.scale_(x, g, ctx.static.spec.implementation)
        return *gradients, None, None, None, None


class LinearRows(Function):
    """(loss, lse, s, predicted) per row; the first two differentiable together or alone."""

    @staticmethod
    def forward(hidden, weight, bias, target, class_weight, static: Static, with_argmax: bool):
        return linear_stats(Head(hidden, weight, bias, target, class_weight), static, with_argmax=with_argmax)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *head, ctx.static, _ = inputs
        _, lse, target_sum, predicted = output
        ctx.save_for_backward(*head, lse, target_sum)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(target_sum, predicted)

    @staticmethod
    def backward(ctx, dloss, dlse, *_):
        if dloss is None and dlse is None:
            return (None,) * 7
        *head, lse, target_sum = ctx.saved_tensors
        dloss = or_zeros(dloss, lse)
        wanted = list(ctx.needs_input_grad[:4])
        if torch.compiler.is_compiling():
            gradients = linear_grad(Head(*head), Upstream(lse, target_sum, dloss, dlse), ctx.static, wanted)
        else:
            refuse_to_be_detached(dloss, dlse)
            gradients = LinearGradients.apply(*head, lse, target_sum, dloss, dlse, ctx.static, wanted)
        return *gradients, None, None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        return _one_by_one(LinearRows.apply, info, in_dims, args)


class LinearGradients(Function):
    """(dhidden, dweight, dbias, dtarget), None where not wanted; lse and s count as functions of the rest."""

    @staticmethod
    def forward(
        hidden, weight, bias, target, class_weight, lse, target_sum, dloss, dlse, static: Static, wanted: list[bool]
    ):
        head = Head(hidden, weight, bias, target, class_weight)
        return linear_grad(head, Upstream(lse, target_sum, dloss, dlse), static, wanted)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *head, _, _, dloss, dlse, ctx.static, ctx.wanted = inputs
        ctx.save_for_backward(*head, dloss, dlse)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        if all(dy is None for dy in cotangents):
            return (None,) * 11
        *head, dloss, dlse = ctx.saved_tensors
        needs = ctx.needs_input_grad
        wanted = [*needs[:4], needs[7], needs[8]]
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views are nodes to differentiate by that stay connected to their inputs for higher orders.
            views: list[Any] = [_differentiable_view(x) for x in (*head[:4], dloss, dlse)]
            *arrays, dloss_view, dlse_view = views
            outputs = _whole_gradients(Head(*arrays, class_weight=head[4]), dloss_view, dlse_view, ctx)
        pairs = [(y, dy) for y, dy in zip(outputs, cotangents, strict=True) if y is not None and dy is not None]
        targets = [view for view, want in zip(views, wanted, strict=True) if want]
        ys, dys = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(ys, targets, dys, create_graph=create_graph, allow_unused=True))
        dhidden, dweight, dbias, dtarget, ddloss, ddlse = [next(found) if want else None for want in wanted]
        return dhidden, dweight, dbias, dtarget, None, None, None, ddloss, ddlse, None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        return _one_by_one(LinearGradients.apply, info, in_dims, args)


def linear_rows(head: Head, static: Static, *, with_argmax: bool) -> tuple[Tensor, Tensor, Tensor]:
    """loss, lse and argmax (empty unless asked for) per row, differentiable in every mode of PyTorch."""
    if tracing.is_higher_order():
        # Forward mode and derivatives of derivatives by torch.func.
        return whole_rows(head, static)
    if torch.compiler.is_compiling():
        # No Function, as in `torch_api.rules`.
        loss, lse, _, predicted = linear_stats(head, static, with_argmax=with_argmax)
    else:
        loss, lse, _, predicted = LinearRows.apply(*head, static, with_argmax)
    return loss, lse, predicted


def whole_rows(head: Head, static: Static) -> RowOutputs:
    """The rows of whole logits."""
    if static.group is not None:
        what = "forward mode or a second derivative of a sharded vocabulary"
        fail(RuntimeError, what, "first derivatives", "the loss of gathered logits")
    dtype, bias = static.dtype, head.bias
    logits = linear(head.hidden.to(dtype), head.weight.to(dtype), None if bias is None else bias.to(dtype))
    return cross_entropy_rows(
        logits,
        head.target,
        head.class_weight,
        dim=-1,
        implementation="triton" if static.spec.implementation == "triton" else "reference",
        **asdict(static.spec.options),
    )


def _one_by_one(function: Callable, info: Any, in_dims: tuple, args: tuple) -> tuple[tuple, tuple]:
    """The rule of vmap: a call for every element, for the reason that there are chunks."""
    stacked = tuple(one_by_one(function, info.batch_size, in_dims, args))
    return stacked, tuple(None if x is None else 0 for x in stacked)


def _differentiable_view(x: Tensor | None) -> Tensor | None:
    if x is None or not x.is_floating_point():
        return x
    view = x.view_as(x)
    return view if view.requires_grad else view.requires_grad_()


def _whole_gradients(head: Head, dloss: Tensor, dlse: Tensor | None, ctx: Any) -> list[Tensor | None]:
    """The gradients of LinearGradients by autograd through whole logits, differentiable again."""
    out = whole_rows(head, ctx.static)
    total = (out.loss * dloss).sum()
    if dlse is not None:
        total = total + (out.lse * dlse).sum()
    inputs = [x for x, want in zip(head[:4], ctx.wanted, strict=True) if want and x is not None]
    found = iter(torch.autograd.grad(total, inputs, create_graph=True))
    return [next(found) if want else None for want in ctx.wanted]
