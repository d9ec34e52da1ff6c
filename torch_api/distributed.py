"""Rows whose classes are spread over processes: local statistics, one gather of row vectors, local gradients.

Slices j of a row merge by (everything else is as in `ce_kernels.spec`)::

    lse = log Σ_j exp(lse_j)      s = Σ_j s_j      ℓ = Σ_j [ℓ_j + s_j·(lse − lse_j)] + λ·lse²

Every process merges the same gathered numbers in the same order, so results are the same to the last bit. The
collectives are torch.distributed's. First derivatives only: a second one would need collectives of its own.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed._functional_collectives  # its import teaches tracers the collectives
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup, get_rank, get_world_size

from ce_kernels.spec import fail
from torch_api import donation, launch, ops, tracing
from torch_api.arguments import Choices, checked, checked_denominator
from torch_api.reference import counted_weights, is_ignored, label_weights
from torch_api.rows import Inputs, Reducing, RowSpec, Stats, Upstream, or_zeros
from torch_api.rules import check_donation, taken


class Shards(NamedTuple):
    """Over which groups the classes are spread, outermost first, and where each process's slice starts."""

    groups: tuple[ProcessGroup, ...]
    starts: tuple[int, ...]
    own: int
    total_classes: int
    # Slices of a plain tensor are taken to be equal, which only the others know.
    sizes_are_known: bool

    @property
    def start(self) -> int:
        """Where this process's slice starts."""
        return self.starts[self.own]


def equal_shards(n_classes: int, group: ProcessGroup) -> Shards:
    """Slices of n_classes each, in the order of the group's ranks."""
    size = get_world_size(group)
    starts = tuple(rank * n_classes for rank in range(size))
    return Shards((group,), starts, get_rank(group), size * n_classes, sizes_are_known=False)


def local_spec(spec: RowSpec, shards: Shards) -> RowSpec:
    """What the rows of this process's slice have in common."""
    return replace(spec, vocab_start=shards.start, total_classes=shards.total_classes)


def cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None, choices: Choices, reducing: Reducing) -> Tensor:
    """`torch_api.cross_entropy` of this process's slice of the classes."""
    inputs, spec, shards = _slices(input, target, weight, choices, reducing.process_group)
    if reducing.donate:
        donation.check(inputs.logits)
    out, label_weight = row_losses(inputs, spec, shards, donate=reducing.donate)
    if reducing.reduction == "none":
        return out.loss
    total = out.loss.sum()
    if reducing.reduction == "sum":
        return total
    if reducing.denominator is not None:
        return total / checked_denominator(reducing.denominator, total.dtype, total.device)
    if inputs.target.is_floating_point():
        return total / out.loss.numel()
    return total / label_weight.sum()


def cross_entropy_rows(
    input: Tensor, target: Tensor, weight: Tensor | None, choices: Choices, group: ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, lse and argmax of `torch_api.cross_entropy_rows`, of whole rows."""
    out, _ = row_losses(*_slices(input, target, weight, choices, group), with_argmax=True)
    assert out.predicted is not None
    return out.loss, out.lse, out.predicted.long()


def _slices(
    input: Tensor, target: Tensor, weight: Tensor | None, choices: Choices, group: ProcessGroup | None
) -> tuple[Inputs, RowSpec, Shards]:
    assert group is not None
    inputs, spec = checked(input, target, weight, choices, slices=get_world_size(group))
    shards = equal_shards(inputs.logits.shape[-1], group)
    return inputs, local_spec(spec, shards), shards


def row_losses(
    inputs: Inputs, spec: RowSpec, shards: Shards, *, with_argmax: bool = False, donate: bool = False
) -> tuple[Stats, Tensor]:
    """Statistics of whole rows, the same on every process, and the weight of each row's label (1 without weights)."""
    if tracing.is_transformed() or (inputs.weight is not None and inputs.weight.requires_grad):
        fail(
            RuntimeError,
            "torch.func, forward mode or a gradient of class weights with a DTensor or a sharded vocabulary",
            "first derivatives by logits and soft targets",
            "the loss of gathered logits",
        )
    out = _ShardedRowLosses.apply(*inputs, spec, shards, with_argmax, donate)
    return Stats(*out[:4]), out[4]


class _ShardedRowLosses(Function):
    @staticmethod
    def forward(ctx, logits, target, weight, spec: RowSpec, shards: Shards, with_argmax: bool, donate: bool):
        inputs = Inputs(logits, target, weight)
        # The z-loss is one of the whole row.
        local = replace(spec, options=replace(spec.options, z_loss=0.0))
        row_operations = ops if tracing.is_opaque(*inputs) else launch
        own = row_operations.stats(inputs, local, with_argmax=with_argmax)
        out, label_weight = _merge(_gathered(inputs, own, shards), inputs, spec, shards, with_argmax)
        ctx.save_for_backward(logits, target, weight, out.lse, out.target_sum)
        ctx.spec, ctx.donate, ctx.spent = spec, donate, False
        ctx.set_materialize_grads(False)
        others = [x for x in (out.target_sum, out.predicted, label_weight) if x is not None]
        ctx.mark_non_differentiable(*others)
        return *out, label_weight

    @staticmethod
    def backward(ctx, dloss, dlse, *_):
        if dloss is None and dlse is None:
            return (None,) * 7
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            what = "create_graph=True with a DTensor or a sharded vocabulary"
            fail(RuntimeError, what, "first derivatives", "the loss of gathered logits")
        if ctx.donate:
            check_donation(ctx, dloss, dlse)
        logits, target, weight, lse, target_sum = ctx.saved_tensors
        dloss = or_zeros(dloss, lse)
        inputs, upstream = Inputs(logits, target, weight), Upstream(lse, target_sum, dloss, dlse)
        row_operations = ops if tracing.is_opaque(*inputs, *upstream) else launch
        dlogits, dtarget = row_operations.grad(
            inputs, upstream, ctx.spec, with_dtarget=ctx.needs_input_grad[1], donate=ctx.donate
        )
        if ctx.donate:
            dlogits = taken(logits, dlogits)
        return dlogits, dtarget, None, None, None, None, None


def _gathered(inputs: Inputs, own: Stats, shards: Shards) -> Tensor:
    """Row vectors of every slice, [slices, vectors, *batch], by one gather a group."""
    logits, target, weight = inputs
    vectors = [own.loss, own.lse, own.target_sum]
    if weight is not None and not target.is_floating_point():
        vectors.append(label_weights(inputs, shards.start, own.loss.dtype))
    if own.predicted is not None:
        best = logits.gather(-1, own.predicted.long()[..., None]).squeeze(-1)
        vectors += [best.to(own.loss.dtype), own.predicted.to(own.loss.dtype)]
    if not shards.sizes_are_known:
        vectors.append(torch.full_like(own.loss, logits.shape[-1]))
    packed = torch.stack(vectors)[None]
    for group in reversed(shards.groups):
        # The operators that torch.distributed's functional collectives are made of: tracers know them.
        collectives = torch.ops._c10d_functional
        gathered = collectives.all_gather_into_tensor(packed, get_world_size(group), group.group_name)
        packed = collectives.wait_tensor(gathered)
    return packed


def _merge(gathered: Tensor, inputs: Inputs, spec: RowSpec, shards: Shards, with_argmax: bool) -> tuple[Stats, Tensor]:
    """Statistics of whole rows and the weights of their labels, from what `_gathered` packed."""
    vectors = gathered.unbind(1)
    loss, lse, s = vectors[0], vectors[1], vectors[2]
    weighted = inputs.weight is not None and not inputs.target.is_floating_point()
    ignored = is_ignored(inputs, spec.options)
    target_sum = s.sum(0)
    top = lse.amax(0)
    base = torch.where(top == -torch.inf, 0.0, top)
    log_d = (lse - base).exp().sum(0).log()
    whole = base + log_d
    # A slice of only −inf has an infinite loss where it holds mass (NaN by itself), and none where it does not.
    masked = torch.where(top == -torch.inf, torch.nan, s * torch.inf)
    # Against the largest lse_j, so that a confident row keeps its small loss.
    own = torch.where(lse == -torch.inf, masked, loss + s * (base - lse))
    row_loss = torch.where(s == 0, 0.0, own).sum(0) + torch.where(target_sum == 0, 0.0, target_sum * log_d)
    if spec.options.z_loss:
        row_loss = row_loss + spec.options.z_loss * whole * whole
    if not shards.sizes_are_known:
        row_loss = _checked_sizes(row_loss, vectors[-1], inputs)
    row_loss = torch.where(ignored, 0.0, torch.where(target_sum.isnan(), torch.nan, row_loss))
    if weighted:
        label_weight = counted_weights(vectors[3].sum(0), inputs, spec.options, shards.total_classes)
    else:
        label_weight = torch.where(ignored, 0.0, torch.ones_like(row_loss))
    if not with_argmax:
        return Stats(row_loss, torch.where(ignored, 0.0, whole), target_sum), label_weight
    best, column = vectors[3 + weighted], vectors[4 + weighted]
    scaled = torch.where(best == -torch.inf, best, best * spec.options.logit_scale)
    slice_ = scaled.argmax(0)
    # No tensor of the starts: copying one to the device would wait for it.
    start = sum((slice_ == i) * first for i, first in enumerate(shards.starts))
    predicted = column.gather(0, slice_[None])[0].long() + start
    return Stats(row_loss, whole, target_sum, predicted.int()), label_weight


def _checked_sizes(loss: Tensor, sizes: Tensor, inputs: Inputs) -> Tensor:
    """Raises for slices of different sizes where looking costs no synchronisation; else their loss is NaN."""
    equal = (sizes == inputs.logits.shape[-1]).all(0)
    if loss.device.type == "cpu" and tracing.is_eager(loss) and not equal.all():
        fail(
            ValueError,
            f"vocabulary slices of {sorted(set(sizes.flatten().int().tolist()))} classes",
            "slices of one size on every process of process_group",
            "a padded vocabulary, or a DTensor, whose sizes are known",
        )
    return torch.where(equal, loss, torch.nan)
