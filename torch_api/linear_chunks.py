"""The chunk loops of a linear head: a chunk of logits is made, becomes its gradient in place, and is overwritten.

    stats   loss, lse, s (and argmax) of every row                     one matmul
    fused   loss, lse, s and the gradients of Σ loss / denominator     three matmuls
    grad    gradients for any upstream gradients of loss and lse       three matmuls, one for the logits again

A chunk's logits have the dtype and the values of hidden @ weight.T + bias. Weights that are one process's slice of the
vocabulary merge their statistics chunk by chunk, and their gradients by hidden at the end.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ce_kernels.linear import chunk_rows
from torch_api import launch
from torch_api.arguments import check_labels
from torch_api.reference import compute_dtype
from torch_api.rows import Inputs, RowSpec, Stats, Upstream


class Head(NamedTuple):
    """hidden [N, D], weight [V, D], bias [V], target [N] or [N, V], class_weight [V]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    class_weight: Tensor | None


class Static(NamedTuple):
    """What is known without data. dtype: the logits'; group: the name of the processes that have the other classes."""

    spec: RowSpec
    max_logits_bytes: int
    accumulation: str
    dtype: torch.dtype
    group: str | None


def stats(head: Head, static: Static, *, with_argmax: bool) -> Stats:
    """Statistics of every row."""
    loss, lse, target_sum = row_outputs(head, static)
    predicted = head.hidden.new_empty(len(loss), dtype=torch.int32) if with_argmax else None
    with _plain(head):
        _check_labels(head, static.spec)
        cast = _cast(head, static)
        for part, logits in _logits(cast, static):
            out = _row_stats(Inputs(logits, cast.target[part], cast.class_weight), static, with_argmax)
            loss[part], lse[part], target_sum[part] = out.loss, out.lse, out.target_sum
            if predicted is not None and out.predicted is not None:
                predicted[part] = out.predicted
    return Stats(loss, lse, target_sum, predicted)


def fused(head: Head, denominator: Tensor, static: Static, wanted: list[bool]) -> tuple[Stats, "Gradients"]:
    """Statistics of every row, and the gradients of Σ loss / denominator, a 0-d tensor."""
    loss, lse, target_sum = row_outputs(head, static)
    with _plain(head):
        _check_labels(head, static.spec)
        cast = _cast(head, static)
        gradients = Gradients(head, cast, static, wanted)
        for part, logits in _logits(cast, static):
            out, dlogits = _row_fused(Inputs(logits, cast.target[part], cast.class_weight), denominator, static)
            loss[part], lse[part], target_sum[part] = out.loss, out.lse, out.target_sum
            gradients.add(part, dlogits)
    return Stats(loss, lse, target_sum), gradients


def grad(head: Head, upstream: Upstream, static: Static, wanted: list[bool]) -> tuple["Gradients", Tensor | None]:
    """Gradients for any upstream gradients, and those by soft targets."""
    dtarget = head.target.new_empty(head.target.shape) if wanted[3] else None
    lse, target_sum, dloss, dlse = upstream
    with _plain(head):
        cast = _cast(head, static)
        gradients = Gradients(head, cast, static, wanted)
        for part, logits in _logits(cast, static):
            inputs = Inputs(logits, cast.target[part], cast.class_weight)
            own = Upstream(lse[part], target_sum[part], dloss[part], None if dlse is None else dlse[part])
            dlogits, found = launch.grad(inputs, own, static.spec, with_dtarget=wanted[3], donate=True)
            if dtarget is not None and found is not None:
                dtarget[part] = found
            gradients.add(part, dlogits)
    return gradients, dtarget


class Gradients:
    """Gradients by hidden, weight and bias, chunk by chunk; one that is not wanted costs nothing."""

    def __init__(self, head: Head, cast: Head, static: Static, wanted: list[bool]) -> None:
        self.head, self.cast, self.static = head, cast, static
        # Sums are as wide as the parameter, and float32 at the least, unless rounding every partial sum is allowed.
        narrow = static.accumulation == "parameter" and head.weight.dtype == static.dtype
        dtype = head.weight.dtype if narrow else torch.promote_types(head.weight.dtype, torch.float32)
        want_hidden, want_weight, want_bias = wanted[:3]
        self.dhidden = head.hidden.new_empty(head.hidden.shape) if want_hidden else None
        self.dweight = head.weight.new_empty(head.weight.shape, dtype=dtype) if want_weight else None
        wide = compute_dtype(cast.hidden)
        self.dbias = head.weight.new_zeros(len(head.weight), dtype=wide) if want_bias else None
        if self.dweight is not None and not len(head.hidden):
            self.dweight.zero_()

    def add(self, part: slice, dlogits: Tensor) -> None:
        """Takes in the chunk of rows `part`."""
        if self.dhidden is not None:
            if self.dhidden.dtype == dlogits.dtype:
                torch.mm(dlogits, self.cast.weight, out=self.dhidden[part])
            else:
                self.dhidden[part] = dlogits @ self.cast.weight
        if self.dweight is not None:
            _accumulate(self.dweight, dlogits.T, self.cast.hidden[part], first=part.start == 0)
        if self.dbias is not None:
            self.dbias += dlogits.sum(0, dtype=self.dbias.dtype)

    def finished(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dhidden, dweight, dbias in the dtypes of what they are gradients of; None where not wanted."""
        head = self.head
        if self.dhidden is not None and self.static.group is not None:
            # Every slice of the classes has its share in it.
            torch.distributed.all_reduce(self.dhidden, group=_group(self.static.group))
        return (
            self.dhidden,
            None if self.dweight is None else self.dweight.to(head.weight.dtype),
            None if self.dbias is None or head.bias is None else self.dbias.to(head.bias.dtype),
        )


def row_outputs(head: Head, static: Static) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the loss, lse and s of every row."""
    wide = torch.float64 if static.dtype == torch.float64 else torch.float32
    hidden = head.hidden
    return tuple(hidden.new_empty(hidden.shape[0], dtype=wide) for _ in range(3))  # pyright: ignore


def _row_stats(inputs: Inputs, static: Static, with_argmax: bool) -> Stats:
    if static.group is None:
        return launch.stats(inputs, static.spec, with_argmax=with_argmax)
    from torch_api import distributed

    # The z-loss is one of the whole row.
    local = replace(static.spec, options=replace(static.spec.options, z_loss=0.0))
    own = launch.stats(inputs, local, with_argmax=with_argmax)
    shards = distributed.equal_shards(inputs.logits.shape[-1], _group(static.group))
    gathered = distributed._gathered(inputs, own, shards)
    return distributed._merge(gathered, inputs, static.spec, shards, with_argmax)[0]


def _row_fused(inputs: Inputs, denominator: Tensor, static: Static) -> tuple[Stats, Tensor]:
    if static.group is None:
        return launch.fused(inputs, denominator, static.spec, donate=True)
    # The gradient waits for the merged lse.
    out = _row_stats(inputs, static, with_argmax=False)
    dloss = denominator.reciprocal().expand(out.lse.shape)
    upstream = Upstream(out.lse, out.target_sum, dloss, None)
    return out, launch.grad(inputs, upstream, static.spec, with_dtarget=False, donate=True)[0]


def _group(name: str) -> Any:
    return torch.distributed.distributed_c10d._resolve_process_group(name)  # pyright: ignore


@contextmanager
def _plain(head: Head) -> Iterator[None]:
    """No gradient is recorded, and autocast casts nothing behind the loop's back, whoever calls it."""
    with torch.no_grad(), torch.autocast(head.hidden.device.type, enabled=False):
        yield


def _cast(head: Head, static: Static) -> Head:
    bias = None if head.bias is None else head.bias.to(static.dtype)
    return head._replace(hidden=head.hidden.to(static.dtype), weight=head.weight.to(static.dtype), bias=bias)


def _check_labels(head: Head, spec: RowSpec) -> None:
    # Where it costs no synchronisation; here, so that compiled programs check too.
    target, n_classes = head.target, spec.total_classes or len(head.weight)
    if target.device.type != "cpu" or target.is_floating_point():
        return
    check_labels(target, n_classes, spec.options, "labels")


def _logits(head: Head, static: Static) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of rows and their logits; every chunk's are written over those of the chunk before."""
    n_rows, n_classes = len(head.hidden), len(head.weight)
    rows = chunk_rows(n_rows, n_classes, static.dtype.itemsize, static.max_logits_bytes)
    buffer = head.hidden.new_empty(min(rows, n_rows), n_classes)
    for start in range(0, n_rows, rows):
        part = slice(start, min(start + rows, n_rows))
        logits = buffer[: part.stop - start]
        if head.bias is None:
            torch.mm(head.hidden[part], head.weight.T, out=logits)
        else:
            torch.addmm(head.bias, head.hidden[part], head.weight.T, out=logits)
        yield part, logits


def _classes_at_once(total: Tensor) -> int:
    """Even pieces of at most 65536 classes of a large sum.

    cuBLAS adds to the whole of it by a slower kernel: 1.25 (128256·4096) and 1.52 (262144·2560) of the matmul alone,
    in pieces 1.17 and 1.30 (H200, CUDA 13). Pieces of a smaller sum, 151936·2048, are slower: 1.19 instead of 1.12.
    """
    classes, width = total.shape
    if total.nbytes <= 2 * 10**9:
        return classes
    return chunk_rows(classes, width, total.itemsize, 65536 * width * total.itemsize)


def _accumulate(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total (+)= a @ b. The first chunk needs no zeros before it."""
    if total.dtype == a.dtype:
        torch.mm(a, b, out=total) if first else total.addmm_(a, b)
    elif total.device.type == "cuda":
        # bf16 products summed in fp32 inside the matmul, with no fp32 copy of either operand.
        if first:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
            return
        rows = _classes_at_once(total)
        for piece, factor in zip(total.split(rows), a.split(rows), strict=True):
            torch.addmm(piece, factor, b, out_dtype=total.dtype, out=piece)
    else:
        a, b = a.to(total.dtype), b.to(total.dtype)
        torch.mm(a, b, out=total) if first else total.addmm_(a, b)
