"""The row operations as custom operators with fakes, for whoever traces: compile, export, make_fx.

They cannot be looked into, they run `torch_api.launch`, and their gradients are laid out as `torch.empty_like` lays
them. Statistics have a derivative of their own for graphs that hold nothing else of ours: compiled programs, and
exported ones that are trained.
"""

import torch
from torch import Tensor, library

from ce_kernels import Options
from ce_kernels.spec import fail
from torch_api import launch, layout
from torch_api.reference import compute_dtype
from torch_api.rows import Inputs, RowSpec, Stats, Upstream, or_zeros

# A RowSpec in a schema.
SPEC = (
    "int? ignore_index, float label_smoothing, float z_loss, float? softcap, float logit_scale, "
    "str implementation, int? vocab_start, int? total_classes"
)
_library = library.Library("ce_kernels", "DEF")
_library.define(
    f"row_statistics(Tensor logits, Tensor target, Tensor? weight, bool with_argmax, {SPEC}) "
    "-> (Tensor loss, Tensor lse, Tensor target_sum, Tensor predicted)"
)
_library.define(
    "row_gradients(Tensor logits, Tensor target, Tensor? weight, Tensor lse, Tensor target_sum, Tensor dloss, "
    f"Tensor? dlse, bool with_dtarget, {SPEC}) -> (Tensor dlogits, Tensor dtarget)"
)


def stats(inputs: Inputs, spec: RowSpec, *, with_argmax: bool) -> Stats:
    """As `launch.stats`."""
    out = torch.ops.ce_kernels.row_statistics(*inputs, with_argmax, *flat_spec(spec))
    return Stats(out[0], out[1], out[2], out[3] if with_argmax else None)


def grad(
    inputs: Inputs, upstream: Upstream, spec: RowSpec, *, with_dtarget: bool, donate: bool = False
) -> tuple[Tensor, Tensor | None]:
    """As `launch.grad`; donation is refused before anything is traced."""
    assert not donate
    dlogits, dtarget = torch.ops.ce_kernels.row_gradients(*inputs, *upstream, with_dtarget, *flat_spec(spec))
    return dlogits, dtarget if with_dtarget else None


def flat_spec(spec: RowSpec) -> tuple:
    """In the types of SPEC."""
    o = spec.options
    return (
        o.ignore_index,
        o.label_smoothing,
        o.z_loss,
        o.softcap,
        o.logit_scale,
        spec.implementation,
        spec.vocab_start,
        spec.total_classes,
    )


def spec_of(ignore_index, label_smoothing, z_loss, softcap, logit_scale, implementation, vocab_start, total_classes):
    """What `flat_spec` was given."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    return RowSpec(options, implementation, vocab_start, total_classes)


def _row_statistics(logits, target, weight, with_argmax, *scalars):
    out = launch.stats(Inputs(logits, target, weight), spec_of(*scalars), with_argmax=with_argmax)
    predicted = _nothing(logits, torch.int32) if out.predicted is None else out.predicted
    return out.loss, out.lse, out.target_sum, predicted


def _row_gradients(logits, target, weight, lse, target_sum, dloss, dlse, with_dtarget, *scalars):
    upstream = Upstream(lse, target_sum, dloss, dlse)
    dlogits, dtarget = launch.grad(
        Inputs(logits, target, weight), upstream, spec_of(*scalars), with_dtarget=with_dtarget
    )
    dtarget = _nothing(logits, target.dtype) if dtarget is None else layout.laid_out(dtarget, target)
    # As its fake promises.
    return layout.laid_out(dlogits, logits), dtarget


def _nothing(like: Tensor, dtype: torch.dtype) -> Tensor:
    # An operator's outputs are tensors: an empty one stands for None.
    return like.new_empty(0, dtype=dtype)


_library.impl("row_statistics", _row_statistics, "CompositeExplicitAutograd")
_library.impl("row_gradients", _row_gradients, "CompositeExplicitAutograd")


def _save(ctx, inputs, output) -> None:
    logits, target, weight, _, *ctx.scalars = inputs
    _, lse, target_sum, _ = output
    ctx.save_for_backward(logits, target, weight, lse, target_sum)
    ctx.set_materialize_grads(False)


def refuse_create_graph() -> None:
    """Raises under create_graph, in the derivatives of operators, whose own derivatives nobody knows."""
    if torch.is_grad_enabled():
        fail(
            RuntimeError,
            "create_graph=True in an exported or compiled graph",
            "first derivatives",
            "the call itself, neither exported nor compiled",
        )


def _row_statistics_backward(ctx, dloss, dlse, *_):
    refuse_create_graph()
    logits, target, weight, lse, target_sum = ctx.saved_tensors
    needs_logits, needs_target, needs_weight = ctx.needs_input_grad[:3]
    if needs_weight:
        fail(
            RuntimeError,
            "class weights that are trained, in an exported graph",
            "weights that were trained when it was exported",
            "weight.requires_grad_() before torch.export.export",
        )
    dlogits = dtarget = None
    if dloss is not None or dlse is not None:
        upstream = Upstream(lse, target_sum, or_zeros(dloss, lse), dlse)
        spec = spec_of(*ctx.scalars)
        dlogits, dtarget = grad(Inputs(logits, target, weight), upstream, spec, with_dtarget=needs_target)
    return dlogits if needs_logits else None, dtarget, *(None,) * (2 + len(ctx.scalars))


library.register_autograd("ce_kernels::row_statistics", _row_statistics_backward, setup_context=_save, lib=_library)


@library.register_fake("ce_kernels::row_statistics", lib=_library)
def _(logits, target, weight, with_argmax, *scalars):
    loss, lse, target_sum = (logits.new_empty(logits.shape[:-1], dtype=compute_dtype(logits)) for _ in range(3))
    predicted = loss.new_empty(loss.shape if with_argmax else 0, dtype=torch.int32)
    return loss, lse, target_sum, predicted


@library.register_fake("ce_kernels::row_gradients", lib=_library)
def _(logits, target, weight, lse, target_sum, dloss, dlse, with_dtarget, *scalars):
    return torch.empty_like(logits), torch.empty_like(target) if with_dtarget else target.new_empty(0)
