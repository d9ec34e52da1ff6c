"""DTensor logits in any sharding, without gathering them: rows stay where they are, slices of a vocabulary merge."""

from itertools import pairwise
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from ce_kernels.checks import check_logits
from ce_kernels.spec import fail
from torch_api import distributed
from torch_api.arguments import Choices, checked, checked_denominator, facts_of
from torch_api.distributed import Shards
from torch_api.reference import compute_dtype
from torch_api.rows import Reducing, Stats


class RowLayout(NamedTuple):
    """How rows of this shape are placed over a mesh."""

    mesh: DeviceMesh
    placements: list[Placement]
    shape: torch.Size

    @property
    def parts(self) -> list[Placement]:
        """How a value is placed that each process has of its own rows."""
        return [Partial() if p.is_shard() else Replicate() for p in self.placements]

    def distributed(self, rows: Tensor) -> DTensor:
        """Local row values as a DTensor of all rows."""
        strides = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(rows, self.mesh, self.placements, run_check=False, shape=self.shape, stride=strides)

    def total(self, value: Tensor) -> DTensor:
        """The sum of a value over the processes that have other rows."""
        whole = [Replicate()] * self.mesh.ndim
        return DTensor.from_local(value, self.mesh, self.parts, run_check=False).redistribute(placements=whole)


class Rows:
    """Statistics of the local rows of DTensor logits, and how rows are laid out over the mesh."""

    def __init__(self, input: Tensor, target: Tensor, weight: Tensor | None, choices: Choices, with_argmax: bool):
        assert isinstance(input, DTensor)
        mesh = input.device_mesh
        axis = check_logits(facts_of("input", input), min(1, input.ndim - 1) if choices.dim is None else choices.dim)
        placements = [plain_placement(p, input.ndim) for p in input.placements]
        shape = input.shape[:axis] + input.shape[axis + 1 :]
        self.layout = RowLayout(mesh, [_without_axis(p, axis) for p in placements], shape)
        soft = target.shape == input.shape
        shards = _shards(mesh, [i for i, p in enumerate(placements) if p.is_shard(axis)], input.shape[axis])
        local_weight = None
        if weight is not None:
            split = [Shard(0) if p.is_shard(axis) else Replicate() for p in placements]
            local_weight = local_part(weight, mesh, split)
        local_target = local_part(target, mesh, placements if soft else self.layout.placements)
        local_logits = local_part(input, mesh, placements)
        # No label check: a process that raises alone leaves the others waiting.
        local_choices = choices._replace(dim=axis)
        self.inputs, spec = checked(local_logits, local_target, local_weight, local_choices, slices=0)
        spec = distributed.local_spec(spec, shards)
        out, self.label_weight = distributed.row_losses(self.inputs, spec, shards, with_argmax=with_argmax)
        self.stats: Stats = out

    def total(self, rows: Tensor) -> Tensor:
        """The sum over all rows of all processes, a plain 0-d tensor on each."""
        return self.layout.total(rows.sum()).to_local()

    def replicated(self, value: Tensor) -> DTensor:
        """A value that every process holds."""
        mesh = self.layout.mesh
        return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    choices: Choices,
    reducing: Reducing,
) -> DTensor:
    """`torch_api.cross_entropy` of DTensor logits: rows as they are sharded, or a replicated scalar."""
    reduction, denominator = reducing.reduction, reducing.denominator
    if reducing.donate:
        what = "donate_logits=True with a DTensor"
        fail(ValueError, what, "logits whose memory is one tensor's", "donate_logits=False, or process_group")
    rows = Rows(input, target, weight, choices, with_argmax=False)
    if reduction == "none":
        return rows.layout.distributed(rows.stats.loss)
    total = rows.total(rows.stats.loss)
    if reduction == "sum":
        return rows.replicated(total)
    if denominator is not None:
        dtype = compute_dtype(rows.inputs.logits)
        denominator = denominator.full_tensor() if isinstance(denominator, DTensor) else denominator
        return rows.replicated(total / checked_denominator(denominator, dtype, total.device))
    if rows.inputs.target.is_floating_point():
        n_rows = rows.layout.shape.numel()
        return rows.replicated(total / n_rows)
    return rows.replicated(total / rows.total(rows.label_weight))


def cross_entropy_rows(
    input: Tensor, target: Tensor, weight: Tensor | None, choices: Choices, _: ProcessGroup | None
) -> tuple[DTensor, DTensor, DTensor]:
    """loss, lse and argmax of `torch_api.cross_entropy_rows`, sharded as the rows of the logits."""
    rows = Rows(input, target, weight, choices, with_argmax=True)
    out = rows.stats
    assert out.predicted is not None
    return (
        rows.layout.distributed(out.loss),
        rows.layout.distributed(out.lse),
        rows.layout.distributed(out.predicted.long()),
    )


def plain_placement(placement: Placement, ndim: int, name: str = "logits") -> Placement:
    """A placement without negative dimensions or partial sums."""
    if type(placement) is Shard:
        return Shard(placement.dim % ndim)
    if placement.is_partial():
        return Replicate()
    if placement.is_replicate():
        return placement
    fail(ValueError, f"{name} placed as {placement}", "Shard, Replicate or Partial", f"{name}.redistribute(…)")


def _without_axis(placement: Placement, axis: int) -> Placement:
    """Where rows are: a sharded class axis replicates them."""
    if not isinstance(placement, Shard):
        return placement
    if placement.dim == axis:
        return Replicate()
    return Shard(placement.dim - (placement.dim > axis))


def local_part(
    array: Tensor, mesh: DeviceMesh, placements: list[Placement], grad_placements: list[Placement] | None = None
) -> Tensor:
    """The part of this process; a plain tensor is the whole, the same on every process.

    grad_placements: what the local gradient is of the whole one, where it is not placed as the array.
    """
    if not isinstance(array, DTensor):
        array = DTensor.from_local(array, mesh, [Replicate()] * mesh.ndim, run_check=False)
    if tuple(array.placements) != tuple(placements) or grad_placements is not None:
        # In the backward it places the gradient as the array.
        array = array.redistribute(placements=placements)
    local = array.to_local(grad_placements=grad_placements)
    if local.requires_grad and not torch.compiler.is_compiling():
        _notice_writes(array, local)
    return local


def _notice_writes(array: DTensor, local: Tensor) -> None:
    # PyTorch counts the writes to a DTensor, and not those that its part gets by them.
    version = array._version

    def check(_: Tensor) -> None:
        if array._version != version:
            what = "a backward through a DTensor that was written to after the loss"
            fail(
                RuntimeError,
                what,
                "what the loss has read: it is read again",
                "the write before the loss, or a clone()",
            )

    local.register_hook(check)


def _shards(mesh: DeviceMesh, dims: list[int], n_classes: int) -> Shards:
    """The slices of n_classes classes sharded over mesh dimensions, outermost first, as DTensor cuts them."""
    slices = [(0, n_classes)]
    own, coordinate = 0, mesh.get_coordinate()
    assert coordinate is not None
    for dim in dims:
        size = mesh.size(dim)
        slices = [part for start, length in slices for part in _cut(start, length, size)]
        own = own * size + coordinate[dim]
    if not all(length for _, length in slices):
        fail(
            ValueError,
            f"{n_classes} classes sharded over {len(slices)} processes, some of which hold none",
            "a class on every process",
            "logits.redistribute(…) over fewer",
        )
    groups = tuple(mesh.get_group(dim) for dim in dims)
    return Shards(groups, tuple(start for start, _ in slices), own, n_classes, sizes_are_known=True)


def _cut(start: int, length: int, pieces: int) -> list[tuple[int, int]]:
    """(start, length) of torch.chunk's pieces, the last ones shorter or empty."""
    chunk = ceil(length / pieces)
    ends = [min(chunk * i, length) for i in range(pieces + 1)]
    return [(start + a, b - a) for a, b in pairwise(ends)]
