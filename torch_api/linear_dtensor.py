"""A linear head of DTensors: rows stay where they are, and classes are sliced where no rows are.

over a mesh dimension         hidden          weight, bias
rows sharded                  its own rows    gathered; gradients are summed over the dimension
weight sharded by classes     whole           its own classes, in equal slices over one dimension
anything else                 gathered        gathered
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from ce_kernels import Options
from ce_kernels.checks import label_error
from ce_kernels.spec import Reduction, fail
from torch_api import linear
from torch_api.arguments import invalid_labels
from torch_api.dtensor import RowLayout, local_part, plain_placement
from torch_api.linear_arguments import NAMES, LinearChoices, check_tensors, checked_head, divided_by
from torch_api.linear_chunks import Head


class _Local(NamedTuple):
    """The arrays of one process, how their rows are placed, and the group that the classes are spread over."""

    head: Head
    rows: RowLayout
    group: ProcessGroup | None

    def of[R](self, function: Callable[..., R], options: Options, choices: LinearChoices, **others) -> R:
        """A function of `torch_api.linear` of the local arrays."""
        hidden, weight, bias, target, class_weight = self.head
        known = asdict(options) | choices._replace(process_group=self.group)._asdict() | others
        return function(hidden, weight, target, bias, class_weight, **known)

    def shared(self, value: Tensor) -> Tensor:
        """A value that every process holds, whose gradient is the sum of what their rows give it."""
        return local_part(value, self.rows.mesh, [Replicate()] * self.rows.mesh.ndim, self.rows.parts)


def cross_entropy(
    head: Head, options: Options, choices: LinearChoices, reduction: Reduction, denominator: float | Tensor | None
) -> DTensor:
    """`torch_api.linear_cross_entropy` of DTensors: rows as they are sharded, or a replicated scalar."""
    local = _local(head, options, choices)
    loss = partial(local.of, linear.linear_cross_entropy, options, choices)
    if reduction == "none":
        return local.rows.distributed(loss(reduction="none"))
    if reduction == "sum":
        return local.rows.total(loss(reduction="sum"))
    if denominator is None:
        own, static = checked_head(local.head, options, choices._replace(process_group=local.group))
        by = local.rows.total(divided_by(own, static, None)).to_local()
    else:
        by = local.shared(denominator) if isinstance(denominator, Tensor) else denominator
    return local.rows.total(loss(denominator=by))


def cross_entropy_rows(head: Head, options: Options, choices: LinearChoices) -> tuple[DTensor, DTensor, DTensor]:
    """loss, lse and argmax of `torch_api.linear_cross_entropy_rows`, sharded as the rows of hidden."""
    local = _local(head, options, choices)
    loss, lse, predicted = local.of(linear.linear_cross_entropy_rows, options, choices)
    return local.rows.distributed(loss), local.rows.distributed(lse), local.rows.distributed(predicted)


def _local(head: Head, options: Options, choices: LinearChoices) -> _Local:
    hidden, weight, bias, target, class_weight = head
    assert isinstance(hidden, DTensor)
    mesh, ndim = hidden.device_mesh, hidden.ndim
    check_tensors(head)
    for name, x in zip(NAMES, head, strict=True):
        if isinstance(x, DTensor) and x.device_mesh != mesh:
            fail(ValueError, f"{name} on {x.device_mesh} with hidden on {mesh}", "one mesh", f"{name}.redistribute(…)")
    if choices.process_group is not None:
        fail(ValueError, "process_group with DTensors", "DTensors alone, which say how they are sharded", "no group")
    placed = [plain_placement(p, ndim, "hidden") for p in hidden.placements]
    rows: list[Placement] = [p if isinstance(p, Shard) and p.dim < ndim - 1 else Replicate() for p in placed]
    sliced = _class_dimension(weight, rows)
    classes: list[Placement] = [Shard(0) if i == sliced else Replicate() for i in range(mesh.ndim)]
    soft = target.is_floating_point()
    of_target: list[Placement] = [Shard(ndim - 1) if soft and i == sliced else p for i, p in enumerate(rows)]
    # Where others have other rows, a process has a part of the sum.
    summed: list[Placement] = [Partial() if p.is_shard() else c for p, c in zip(rows, classes, strict=True)]
    local = _Local(
        Head(
            local_part(hidden, mesh, rows),
            local_part(weight, mesh, classes, summed),
            None if bias is None else local_part(bias, mesh, classes, summed),
            local_part(target, mesh, of_target),
            None if class_weight is None else local_part(class_weight, mesh, classes),
        ),
        RowLayout(mesh, rows, hidden.shape[:-1]),
        None if sliced is None else mesh.get_group(sliced),
    )
    if not soft:
        _check_labels(local, options, weight.shape[0])
    return local


def _check_labels(local: _Local, options: Options, n_classes: int) -> None:
    """IndexError on every process, where looking costs no synchronisation: one alone would leave the others waiting."""
    target = local.head.target
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        return
    none = torch.iinfo(torch.int64).min
    bad = target.long()[invalid_labels(target, n_classes, options)]
    worst = bad.amax() if bad.numel() else torch.tensor(none)
    mesh = local.rows.mesh
    largest = [Partial("max")] * mesh.ndim
    found = int(DTensor.from_local(worst, mesh, largest, run_check=False).full_tensor())
    if found != none:
        label_error("labels", found, n_classes)


def _class_dimension(weight: Tensor, rows: list[Placement]) -> int | None:
    """The mesh dimension over which the classes stay in equal slices, if there is one, and one alone."""
    if not isinstance(weight, DTensor):
        return None
    sliced = [i for i, p in enumerate(weight.placements) if p.is_shard(0) and not rows[i].is_shard()]
    if len(sliced) != 1 or weight.shape[0] % weight.device_mesh.size(sliced[0]):
        return None
    return sliced[0]
