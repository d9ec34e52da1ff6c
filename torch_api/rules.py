"""Derivatives: autograd Functions over the row operations.

    RowLosses      (loss, lse, s, predicted) of rows, for any upstream gradients: statistics, then gradient
    RowGradients   the backward of RowLosses as an operation of its own, so that it can be differentiated again
    FusedLoss      Σ loss / denominator with the gradient computed in the forward: the fast path of eager training

Second derivatives, and forward mode, go through the plain operations of `torch_api.reference`, which PyTorch
differentiates in every mode. `torch.func` folds mapped dimensions into rows: a vmap is one launch.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ce_kernels.spec import fail
from torch_api import launch, ops, reductions, reference, tracing
from torch_api.batching import to_rows
from torch_api.rows import Inputs, RowSpec, Stats, Upstream, or_zeros


def row_losses(inputs: Inputs, spec: RowSpec, *, with_argmax: bool = False, donate: bool = False) -> Stats:
    """Statistics of rows, differentiable in loss and lse: alone or together, in whatever mode is active."""
    if tracing.is_eager(*inputs):
        if needs_graph(inputs):
            return Stats(*_EagerRowLosses.apply(*inputs, spec, with_argmax, donate))
        return launch.stats(inputs, spec, with_argmax=with_argmax)
    compiling = torch.compiler.is_compiling()
    trains_weight = inputs.weight is not None and inputs.weight.requires_grad
    if tracing.is_higher_order() or (trains_weight and compiling):
        return plain_row_losses(inputs, spec, with_argmax=with_argmax)
    if compiling:
        # No Function: for what one saves, Dynamo does not notice that it is written to before the backward.
        return ops.stats(inputs, spec, with_argmax=with_argmax)
    return Stats(*RowLosses.apply(*inputs, spec, with_argmax, False))


def needs_graph(inputs: Inputs) -> bool:
    """Whether autograd must know where a result of these inputs came from."""
    logits, target, weight = inputs
    return torch.is_grad_enabled() and (
        logits.requires_grad or target.requires_grad or (weight is not None and weight.requires_grad)
    )


def plain_row_losses(inputs: Inputs, spec: RowSpec, *, with_argmax: bool) -> Stats:
    """`row_losses` in operations that every transform differentiates to every order, with their memory."""
    ignored = reference.is_ignored(inputs, spec.options)
    # Ignored rows may hold anything, also where a derivative multiplies it by 0.
    logits = inputs.logits if with_argmax else torch.where(ignored[..., None], 0.0, inputs.logits)
    out = reference.stats(launch.flat(Inputs(logits, inputs.target, inputs.weight)), spec, with_argmax)
    shape = inputs.logits.shape[:-1]
    predicted = None if out.predicted is None else out.predicted.reshape(shape)
    return Stats(out.loss.reshape(shape), out.lse.reshape(shape), out.target_sum.reshape(shape), predicted)


class RowLosses(Function):
    """(loss, lse, s, predicted) per row; the first two differentiable together or alone."""

    @staticmethod
    def forward(logits, target, weight, spec: RowSpec, with_argmax: bool, donate: bool):
        row_operations = ops if tracing.is_opaque(logits, target, weight) else launch
        return tuple(row_operations.stats(Inputs(logits, target, weight), spec, with_argmax=with_argmax))

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, target, weight, ctx.spec, _, ctx.donate = inputs
        _, lse, target_sum, predicted = output
        ctx.save_for_backward(logits, target, weight, lse, target_sum)
        ctx.set_materialize_grads(False)
        ctx.spent = False
        if predicted is None:
            ctx.mark_non_differentiable(target_sum)
        else:
            ctx.mark_non_differentiable(target_sum, predicted)

    @staticmethod
    def backward(ctx, *upstream):
        dloss, dlse, _, _ = upstream
        if dloss is None and dlse is None:
            return (None,) * 6
        if ctx.donate:
            check_donation(ctx, dloss, dlse)
        logits, target, weight, lse, target_sum = ctx.saved_tensors
        dloss = or_zeros(dloss, lse)
        needs_logits, needs_target, needs_weight = ctx.needs_input_grad[:3]
        dlogits = dtarget = dweight = None
        if needs_weight:
            dweight = _weight_gradient(Inputs(logits, target, weight), ctx.spec, dloss)
        if ctx.donate and needs_logits:
            upstream = Upstream(lse, target_sum, dloss, dlse)
            dlogits, dtarget = launch.grad(
                Inputs(logits, target, weight), upstream, ctx.spec, with_dtarget=needs_target, donate=True
            )
            dlogits = taken(logits, dlogits)
        elif needs_logits or needs_target:
            dlogits, dtarget = _row_gradients(
                logits, target, weight, lse, target_sum, dloss, dlse, ctx.spec, needs_target
            )
        return dlogits, dtarget, dweight, None, None, None

    @staticmethod
    def vmap(info, in_dims, logits, target, weight, spec, with_argmax, donate):
        def own(logits, target, weight):
            return RowLosses.apply(logits, target, weight, spec, with_argmax, donate)

        return to_rows(own, info.batch_size, in_dims[:3], (logits, target, weight), weight=2)


class RowGradients(Function):
    """(dlogits, dtarget) per row from saved statistics; lse and s count as functions of the logits."""

    @staticmethod
    def forward(logits, target, weight, lse, target_sum, dloss, dlse, spec: RowSpec, with_dtarget: bool):
        inputs, upstream = Inputs(logits, target, weight), Upstream(lse, target_sum, dloss, dlse)
        opaque = tracing.is_opaque(*inputs, *upstream) or tracing.is_batched(dloss, dlse)
        row_operations = ops if opaque else launch
        return row_operations.grad(inputs, upstream, spec, with_dtarget=with_dtarget)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, target, weight, _, _, dloss, dlse, ctx.spec, ctx.with_dtarget = inputs
        ctx.save_for_backward(logits, target, weight, dloss, dlse)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        spec, with_dtarget = ctx.spec, ctx.with_dtarget

        def plain(logits, target, weight, dloss, dlse):
            return _plain_row_gradients(logits, target, weight, dloss, dlse, spec, with_dtarget)

        wanted = ctx.needs_input_grad[:3] + ctx.needs_input_grad[5:7]
        dlogits, dtarget, dweight, ddloss, ddlse = _plain_gradients(plain, ctx.saved_tensors, wanted, cotangents)
        return dlogits, dtarget, dweight, None, None, ddloss, ddlse, None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        def own(*tensors):
            return RowGradients.apply(*tensors, *args[7:])

        return to_rows(own, info.batch_size, in_dims[:7], args[:7], weight=2)


def _plain_row_gradients(
    logits, target, weight, dloss, dlse, spec: RowSpec, with_dtarget: bool
) -> tuple[Tensor, Tensor | None]:
    """`RowGradients` in operations that every transform differentiates."""
    shape, soft_shape = logits.shape, target.shape
    dloss, dlse = dloss.reshape(-1), None if dlse is None else dlse.reshape(-1)
    inputs = launch.flat(Inputs(logits, target, weight))
    inputs = reference.without_dead_rows(inputs, spec, dloss, dlse)
    # With argmax for the lse of ignored rows: their gradient, 0 · exp(x − lse), must be finite to be differentiated.
    out = reference.stats(inputs, spec, with_argmax=True)
    upstream = Upstream(out.lse, out.target_sum, dloss, dlse)
    dlogits, dtarget = reference.grad(inputs, upstream, spec, with_dtarget, skip_zero=False)
    return dlogits.reshape(shape), None if dtarget is None else dtarget.reshape(soft_shape)


class _EagerRowLosses(RowLosses):
    # Without setup_context: 50 µs less a call (torch 2.15), and no torch.func.
    setup_context = Function.setup_context

    @staticmethod
    def forward(ctx, *args):
        *inputs, spec, with_argmax, _ = args
        out = launch.stats(Inputs(*inputs), spec, with_argmax=with_argmax)
        RowLosses.setup_context(ctx, args, out)
        return out


class _EagerRowGradients(RowGradients):
    setup_context = Function.setup_context

    @staticmethod
    def forward(ctx, *args):
        out = RowGradients.forward(*args)
        RowGradients.setup_context(ctx, args, out)
        return out


class FusedLoss(Function):
    """Σ loss / denominator (a 0-d tensor), with dlogits computed in the forward; eager only."""

    @staticmethod
    def forward(ctx, logits, target, weight, denominator, spec: RowSpec):
        out, dlogits = launch.fused(Inputs(logits, target, weight), denominator, spec)
        ctx.spec, ctx.spent = spec, False
        ctx.save_for_backward(dlogits, logits, target, weight, out.lse, out.target_sum, denominator)
        return reductions.mean(out.loss, denominator, spec)

    @staticmethod
    def backward(ctx, g):
        dlogits, *saved = ctx.saved_tensors
        if torch.is_grad_enabled() or ctx.spent or _is_mapped(g):
            # Under create_graph, or after a first backward gave its buffer away: compute the gradient anew.
            logits, target, weight, lse, target_sum, denominator = saved
            dloss = (g / denominator).expand(lse.shape)
            dlogits, _ = _row_gradients(logits, target, weight, lse, target_sum, dloss, None, ctx.spec, False)
            return dlogits, None, None, None, None
        ctx.spent = True
        # `.data`: its receiver may write to it (.grad accumulates in place) without invalidating the node that saved
        # it, which never reads it again.
        dlogits = dlogits.data
        launch.scale_(dlogits, g, ctx.spec.implementation)
        return dlogits, None, None, None, None


def refuse_to_be_detached(*upstream: Tensor | None) -> None:
    """Raises where a backward is mapped and recorded at once: of a Function that PyTorch maps, nothing is recorded."""
    if torch.is_grad_enabled() and tracing.is_batched(*upstream):
        fail(
            RuntimeError,
            "create_graph=True with is_grads_batched=True (or vectorize=True)",
            "derivatives by torch.func where they are differentiated again",
            "torch.func.jacrev, or torch.func.vmap over torch.autograd.grad(…, create_graph=True)",
        )


def _row_gradients(*args) -> tuple[Tensor, Tensor | None]:
    if tracing.is_forward_mode():
        # The backward of a loss that was computed before: a Function has no rule for tangents.
        return _plain_row_gradients(*args[:3], *args[5:])
    refuse_to_be_detached(*args[5:7])
    return (_EagerRowGradients if tracing.is_eager(*args[:7]) else RowGradients).apply(*args)


def _is_mapped(g: Tensor) -> bool:
    return not tracing.is_eager(g) or tracing.is_batched(g)


def taken(logits: Tensor, dlogits: Tensor) -> Tensor:
    """The gradient of donated logits; whoever else saved them raises in backward instead of reading a gradient."""
    if dlogits.data_ptr() == logits.data_ptr():
        torch.autograd.graph.increment_version(logits)
    return dlogits.data


def check_donation(ctx, *upstream: Tensor | None) -> None:
    """Raises where a backward needs donated logits that are no more, or will be needed once more."""
    if torch.is_grad_enabled():
        fail(
            RuntimeError,
            "create_graph=True through donated logits",
            "logits that are kept: second derivatives read them",
            "donate_logits=False",
        )
    if any(g is not None and _is_mapped(g) for g in upstream):
        fail(
            RuntimeError,
            "a mapped or traced backward, or one under a dispatch mode, through donated logits",
            "a backward that nothing but autograd sees",
            "donate_logits=False",
        )
    if ctx.spent:
        fail(
            RuntimeError,
            "a second backward through donated logits",
            "one backward: its gradient stands where the logits stood",
            "donate_logits=False where the graph is retained",
        )
    ctx.spent = True


def _weight_gradient(inputs: Inputs, spec: RowSpec, dloss: Tensor) -> Tensor | None:
    # Plain operations: class weights that are trained are rare, and their gradient reduces over rows, not classes.
    if tracing.is_batched(dloss):
        fail(
            RuntimeError,
            "is_grads_batched=True (or vectorize=True) by class weights",
            "torch.func, which maps every operation",
            "torch.func.jacrev by the weights",
        )

    def plain(logits, target, weight, dloss):
        flat = launch.flat(Inputs(logits, target, weight))
        dloss = dloss.reshape(-1)
        rows = reference.stats(reference.without_dead_rows(flat, spec, dloss, None), spec, with_argmax=False).loss
        return ((dloss * rows).sum(),)

    if tracing.is_transformed():
        # The weight's own graph ends where a transform has mapped the upstream gradient.
        return torch.func.grad(lambda weight: plain(inputs.logits, inputs.target, weight, dloss)[0])(inputs.weight)
    one = torch.ones((), dtype=dloss.dtype, device=dloss.device)
    return _plain_gradients(plain, (*inputs, dloss), (False, False, True, False), (one,))[2]


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
    # A gradient may be constant in all that is wanted, as that of probabilities is in them.
    pairs = [(y, dy) for y, dy in pairs if y.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    targets = [view for view, want in zip(views, wanted, strict=True) if want]
    ys, dys = zip(*pairs, strict=True)
    grads: Any = torch.autograd.grad(ys, targets, dys, create_graph=create_graph, allow_unused=True)
    grads = iter(grads)
    return [next(grads) if want else None for want in wanted]
