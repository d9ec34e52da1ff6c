"""The chunk loops of a linear head, as library operations: torch.compile sees each as one node and never looks inside.

    linear_stats   loss, lse, s (and argmax) of every row                  one matmul
    linear_fused   loss, lse, s and the gradients of Σ loss / denominator  three matmuls
    linear_grad    gradients for any upstream gradients of loss and lse    three matmuls, one for the logits again

A chunk's logits have the dtype and the values of hidden @ weight.T + bias, and the next chunk's take their place.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple
from typing import NamedTuple

import torch
from torch import Tensor

from ce_kernels import Options
from ce_kernels.checks import label_error
from ce_kernels.linear import chunk_rows
from torch_api import launch
from torch_api.reference import compute_dtype
from torch_api.rows import Inputs, RowSpec, Upstream


class Head(NamedTuple):
    """hidden [N, D], weight [V, D], bias [V], target [N] or [N, V], class_weight [V]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    class_weight: Tensor | None


class Static(NamedTuple):
    """What is known without data; dtype is that of the logits."""

    spec: RowSpec
    max_logits_bytes: int
    accumulation: str
    dtype: torch.dtype

    def flat(self) -> tuple:
        """In the types of an operation's schema."""
        return *astuple(self.spec.options), self.spec.implementation, *self[1:]

    @classmethod
    def of(cls, flat: list) -> "Static":
        """The inverse of flat."""
        return cls(RowSpec(Options(*flat[:5]), flat[5]), *flat[6:])


_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight"
_STATIC = (
    "int? ignore_index, float label_smoothing, float z_loss, float? softcap, float logit_scale, str implementation, "
    "int max_logits_bytes, str accumulation, ScalarType dtype"
)
_GRADIENTS = "Tensor dhidden, Tensor dweight, Tensor dbias"
_library = torch.library.Library("ce_kernels_linear", "DEF")
_library.define(
    f"stats({_HEAD}, {_STATIC}, bool with_argmax) -> (Tensor loss, Tensor lse, Tensor target_sum, Tensor predicted)"
)
_library.define(
    f"fused({_HEAD}, Tensor denominator, {_STATIC}, bool[] wanted) "
    f"-> (Tensor loss, Tensor lse, Tensor target_sum, {_GRADIENTS})"
)
_library.define(
    f"grad({_HEAD}, Tensor lse, Tensor target_sum, Tensor dloss, Tensor? dlse, {_STATIC}, bool[] wanted) "
    f"-> ({_GRADIENTS}, Tensor dtarget)"
)


def linear_stats(head: Head, static: Static, *, with_argmax: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, lse, s and argmax (empty unless asked for) of every row."""
    return torch.ops.ce_kernels_linear.stats(*head, *static.flat(), with_argmax)


def linear_fused(
    head: Head, denominator: Tensor, static: Static, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, lse, s of every row, and dhidden, dweight, dbias of Σ loss / denominator (empty unless wanted)."""
    return torch.ops.ce_kernels_linear.fused(*head, denominator, *static.flat(), wanted)


def linear_grad(
    head: Head, upstream: tuple[Tensor, Tensor, Tensor, Tensor | None], static: Static, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dhidden, dweight, dbias, dtarget (empty unless wanted) for upstream (lse, s, dloss, dlse)."""
    return torch.ops.ce_kernels_linear.grad(*head, *upstream, *static.flat(), wanted)


def _stats(*arguments):
    head, (*static, with_argmax) = _unpack(arguments)
    static = Static.of(static)
    with _plain(head):
        _check_labels(head, static.spec.options)
        cast = _cast(head, static.dtype)
        loss, lse, target_sum, predicted = _fake_stats(*arguments)
        for part, logits in _logits(cast, static):
            inputs = Inputs(logits, cast.target[part], cast.class_weight)
            out = launch.stats(inputs, static.spec, with_argmax=with_argmax)
            loss[part], lse[part], target_sum[part] = out.loss, out.lse, out.target_sum
            if out.predicted is not None:
                predicted[part] = out.predicted
    return loss, lse, target_sum, predicted


def _fused(*arguments):
    head, (denominator, *static, wanted) = _unpack(arguments)
    static = Static.of(static)
    with _plain(head):
        _check_labels(head, static.spec.options)
        cast = _cast(head, static.dtype)
        loss, lse, target_sum = _row_outputs(head, static.dtype)
        into = _Gradients(head, cast, static, wanted)
        for part, logits in _logits(cast, static):
            inputs = Inputs(logits, cast.target[part], cast.class_weight)
            out, dlogits = launch.fused(inputs, denominator, static.spec, donate=True)
            loss[part], lse[part], target_sum[part] = out.loss, out.lse, out.target_sum
            into.add(part, dlogits)
        return loss, lse, target_sum, *into.finished()


def _grad(*arguments):
    head, (lse, target_sum, dloss, dlse, *static, wanted) = _unpack(arguments)
    static = Static.of(static)
    with _plain(head):
        cast = _cast(head, static.dtype)
        dtarget = _target_output(head, wanted)
        into = _Gradients(head, cast, static, wanted)
        for part, logits in _logits(cast, static):
            inputs = Inputs(logits, cast.target[part], cast.class_weight)
            own = Upstream(lse[part], target_sum[part], dloss[part], None if dlse is None else dlse[part])
            dlogits, dtarget_part = launch.grad(inputs, own, static.spec, with_dtarget=wanted[3], donate=True)
            if dtarget_part is not None:
                dtarget[part] = dtarget_part
            into.add(part, dlogits)
        return *into.finished(), dtarget


def _fake_stats(*arguments):
    head, (*static, with_argmax) = _unpack(arguments)
    predicted = head.hidden.new_empty(len(head.hidden) if with_argmax else 0, dtype=torch.int32)
    return *_row_outputs(head, Static.of(static).dtype), predicted


def _fake_fused(*arguments):
    head, (_, *static, wanted) = _unpack(arguments)
    return *_row_outputs(head, Static.of(static).dtype), *_gradient_outputs(head, wanted)


def _fake_grad(*arguments):
    head, (*_, wanted) = _unpack(arguments)
    return *_gradient_outputs(head, wanted), _target_output(head, wanted)


for _name, _function, _fake in (
    ("stats", _stats, _fake_stats),
    ("fused", _fused, _fake_fused),
    ("grad", _grad, _fake_grad),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ce_kernels_linear::{_name}", _fake, lib=_library)


def _unpack(arguments: tuple) -> tuple[Head, tuple]:
    return Head(*arguments[:5]), arguments[5:]


def _row_outputs(head: Head, dtype: torch.dtype) -> list[Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [head.hidden.new_empty(len(head.hidden), dtype=wide) for _ in range(3)]


def _gradient_outputs(head: Head, wanted: list[bool]) -> list[Tensor]:
    inputs = (head.hidden, head.weight, head.hidden if head.bias is None else head.bias)
    # Contiguous, whatever the strides of the input: a bias may be an expanded number.
    return [x.new_empty(x.shape if want else 0) for x, want in zip(inputs, wanted, strict=False)]


def _target_output(head: Head, wanted: list[bool]) -> Tensor:
    return head.target.new_empty(head.target.shape if wanted[3] else 0)


@contextmanager
def _plain(head: Head) -> Iterator[None]:
    """No gradient is recorded, and autocast casts nothing behind the operation's back, whoever calls it."""
    with torch.no_grad(), torch.autocast(head.hidden.device.type, enabled=False):
        yield


def _cast(head: Head, dtype: torch.dtype) -> Head:
    bias = None if head.bias is None else head.bias.to(dtype)
    return head._replace(hidden=head.hidden.to(dtype), weight=head.weight.to(dtype), bias=bias)


def _check_labels(head: Head, options: Options) -> None:
    # Where it costs no synchronisation; inside the operation, so that compiled programs check too.
    target, n_classes = head.target, len(head.weight)
    if target.device.type != "cpu" or target.is_floating_point():
        return
    bad = (target < 0) | (target >= n_classes)
    if options.ignore_index is not None:
        bad &= target != options.ignore_index
    if bad.any():
        label_error("labels", int(target[bad][0]), n_classes)


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


class _Gradients:
    """Gradients by hidden, weight and bias, chunk by chunk; one that is not wanted costs nothing."""

    def __init__(self, head: Head, cast: Head, static: Static, wanted: list[bool]) -> None:
        self.head, self.cast = head, cast
        self.want_hidden, self.want_weight, self.want_bias = wanted[:3]
        # Sums are as wide as the parameter, and float32 at the least, unless rounding every partial sum is allowed.
        narrow = static.accumulation == "parameter" and head.weight.dtype == static.dtype
        dtype = head.weight.dtype if narrow else torch.promote_types(head.weight.dtype, torch.float32)
        self.dhidden = (
            torch.empty_like(head.hidden, memory_format=torch.contiguous_format) if self.want_hidden else None
        )
        self.dweight = head.weight.new_empty(head.weight.shape, dtype=dtype) if self.want_weight else None
        wide = compute_dtype(cast.hidden)
        self.dbias = head.weight.new_zeros(len(head.weight), dtype=wide) if self.want_bias else None
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

    def finished(self) -> tuple[Tensor, Tensor, Tensor]:
        """dhidden, dweight, dbias in the dtypes of what they are gradients of; empty where not wanted."""
        none = self.head.hidden.new_empty
        return (
            none(0) if self.dhidden is None else self.dhidden,
            none(0) if self.dweight is None else self.dweight.to(self.head.weight.dtype),
            none(0) if self.dbias is None or self.head.bias is None else self.dbias.to(self.head.bias.dtype),
        )


def _accumulate(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total (+)= a @ b. The first chunk needs no zeros before it."""
    if total.dtype == a.dtype:
        torch.mm(a, b, out=total) if first else total.addmm_(a, b)
    elif total.device.type == "cuda":
        # bf16 products summed in fp32 inside the matmul, with no fp32 copy of either operand.
        if first:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        a, b = a.to(total.dtype), b.to(total.dtype)
        torch.mm(a, b, out=total) if first else total.addmm_(a, b)
