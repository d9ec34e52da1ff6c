"""Derivatives: autograd Functions over the row operations of `torch_api.launch`.

    RowLosses      (loss, lse, predicted) of rows, for any upstream gradients: statistics, then gradient
    RowGradients   the backward of RowLosses as an operation of its own, so that it can be differentiated again
    FusedLoss      Σ loss / denominator with the gradient computed in the forward: the fast path of training

Second derivatives go through the plain operations of `torch_api.reference`, differentiated by autograd.
"""

import torch
from torch import Tensor
from torch.autograd import Function

from ce_kernels import Options
from torch_api import launch, reference


class RowLosses(Function):
    """(loss, lse, predicted) per row; the first two differentiable together or alone."""

    @staticmethod
    def forward(ctx, logits, target, weight, options: Options, implementation: str, with_argmax: bool):
        out = launch.stats(logits, target, weight, options, implementation, with_argmax=with_argmax)
        ctx.save_for_backward(logits, target, weight, out.lse, out.target_sum)
        ctx.options, ctx.implementation = options, implementation
        ctx.set_materialize_grads(False)
        if out.predicted is not None:
            ctx.mark_non_differentiable(out.predicted)
        return out.loss, out.lse, out.predicted

    @staticmethod
    def backward(ctx, dloss, dlse, _):
        if dloss is None and dlse is None:
            return (None,) * 6
        logits, target, weight, lse, target_sum = ctx.saved_tensors
        if dloss is None:
            dloss = torch.zeros((), dtype=lse.dtype, device=lse.device).expand(len(lse))
        needs_logits, needs_target, needs_weight = ctx.needs_input_grad[:3]
        dlogits = dtarget = dweight = None
        if needs_logits or needs_target:
            dlogits, dtarget = RowGradients.apply(
                logits, target, weight, lse, target_sum, dloss, dlse, ctx.options, ctx.implementation, needs_target
            )
        if needs_weight:
            dweight = _weight_gradient(logits, target, weight, dloss, ctx.options)
        return dlogits, dtarget, dweight, None, None, None


class RowGradients(Function):
    """(dlogits, dtarget) per row from saved statistics; lse and target_sum count as functions of the logits."""

    @staticmethod
    def forward(ctx, logits, target, weight, lse, target_sum, dloss, dlse, options, implementation, with_dtarget):
        ctx.save_for_backward(logits, target, weight, dloss, dlse)
        ctx.options, ctx.with_dtarget = options, with_dtarget
        ctx.set_materialize_grads(False)
        return launch.grad(
            logits, target, weight, lse, target_sum, dloss, dlse, options, implementation, with_dtarget=with_dtarget
        )

    @staticmethod
    def backward(ctx, ddlogits, ddtarget):
        def plain(logits, target, weight, dloss, dlse):
            logits, target = reference.without_dead_rows(logits, target, weight, dloss, dlse, ctx.options)
            # Ignored rows have an lse only where one was asked for.
            _, lse, target_sum, _ = reference.stats(logits, target, weight, ctx.options, with_argmax=dlse is not None)
            upstream = (lse, target_sum, dloss, dlse)
            return reference.grad(logits, target, weight, *upstream, ctx.options, ctx.with_dtarget, skip_zero=False)

        wanted = ctx.needs_input_grad[:3] + ctx.needs_input_grad[5:7]
        cotangents = (ddlogits, ddtarget)
        dlogits, dtarget, dweight, ddloss, ddlse = _plain_gradients(plain, ctx.saved_tensors, wanted, cotangents)
        return dlogits, dtarget, dweight, None, None, ddloss, ddlse, None, None, None


class FusedLoss(Function):
    """Σ loss / denominator (a 0-d tensor), with dlogits computed in the forward."""

    @staticmethod
    def forward(ctx, logits, target, weight, denominator, options: Options, implementation: str):
        out, dlogits = launch.fused(logits, target, weight, denominator, options, implementation)
        ctx.save_for_backward(logits, target, weight, out.lse, out.target_sum, denominator, dlogits)
        ctx.options, ctx.implementation, ctx.spent = options, implementation, False
        return out.loss.sum() / denominator

    @staticmethod
    def backward(ctx, g):
        logits, target, weight, lse, target_sum, denominator, dlogits = ctx.saved_tensors
        if torch.is_grad_enabled() or ctx.spent:
            # Under create_graph, or after a first backward gave its buffer away: compute the gradient anew.
            dloss = (g / denominator).expand(len(lse))
            dlogits, _ = RowGradients.apply(
                logits, target, weight, lse, target_sum, dloss, None, ctx.options, ctx.implementation, False
            )
        else:
            ctx.spent = True
            dlogits = launch.scaled(dlogits, g, ctx.implementation)
        return dlogits, None, None, None, None, None


def _weight_gradient(logits, target, weight, dloss, options: Options) -> Tensor | None:
    # Plain operations: class weights that are trained are rare, and their gradient reduces over rows, not classes.
    def plain(logits, target, weight, dloss):
        logits, target = reference.without_dead_rows(logits, target, weight, dloss, None, options)
        rows = reference.stats(logits, target, weight, options, with_argmax=False)[0]
        return ((dloss * rows).sum(),)

    one = torch.ones((), dtype=dloss.dtype, device=dloss.device)
    return _plain_gradients(plain, (logits, target, weight, dloss), (False, False, True, False), (one,))[2]


def _plain_gradients(function, inputs, wanted, cotangents) -> list[Tensor | None]:
    """Gradients of plain operations by the wanted inputs; under create_graph themselves differentiable."""
    if all(dy is None for dy in cotangents):
        return [None] * len(inputs)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # A view is a node to differentiate by that stays connected to its input for higher orders.
        views = [x.view_as(x) if want else x for x, want in zip(inputs, wanted, strict=True)]
        outputs = function(*views)
    pairs = [(y, dy) for y, dy in zip(outputs, cotangents, strict=True) if y is not None and dy is not None]
    targets = [view for view, want in zip(views, wanted, strict=True) if want]
    ys, dys = zip(*pairs, strict=True)
    grads = iter(torch.autograd.grad(ys, targets, dys, create_graph=create_graph, allow_unused=True))
    return [next(grads) if want else None for want in wanted]
