"""The chunk loops of `torch_api.linear_chunks` as library operations, which tracers see whole and never look into.

An operation's outputs are tensors: an empty one stands for what is not wanted. Derivatives of their own are for graphs
that hold nothing else of ours: compiled programs, and exported ones that are trained.
"""

import torch
from torch import Tensor, library

from torch_api import linear_chunks
from torch_api.linear_chunks import Head, Static, row_outputs
from torch_api.ops import SPEC, flat_spec, refuse_create_graph, spec_of
from torch_api.rows import Upstream, or_zeros

_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight"
_STATIC = f"{SPEC}, int max_logits_bytes, str accumulation, ScalarType dtype, str? group"
_ROWS, _GRADIENTS = "Tensor loss, Tensor lse, Tensor target_sum", "Tensor dhidden, Tensor dweight, Tensor dbias"
_UPSTREAM = "Tensor lse, Tensor target_sum, Tensor dloss, Tensor? dlse"
_SCHEMAS = (
    f"stats({_HEAD}, {_STATIC}, bool with_argmax) -> ({_ROWS}, Tensor predicted)",
    f"fused({_HEAD}, Tensor denominator, {_STATIC}, bool[] wanted) -> ({_ROWS}, {_GRADIENTS})",
    f"grad({_HEAD}, {_UPSTREAM}, {_STATIC}, bool[] wanted) -> ({_GRADIENTS}, Tensor dtarget)",
    f"loss({_HEAD}, Tensor denominator, {_STATIC}, bool[] wanted) "
    f"-> (Tensor total, Tensor lse, Tensor target_sum, {_GRADIENTS})",
    "watched(Tensor upstream, Tensor hidden, Tensor weight, Tensor? bias) -> Tensor",
)
N_SPEC = SPEC.count(",") + 1
N_STATIC = _STATIC.count(",") + 1
_library = library.Library("ce_kernels_linear", "DEF")


def linear_stats(head: Head, static: Static, *, with_argmax: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, lse, s and argmax of every row."""
    return torch.ops.ce_kernels_linear.stats(*head, *_flat(static), with_argmax)


def linear_fused(
    head: Head, denominator: Tensor, static: Static, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, lse, s of every row, and dhidden, dweight, dbias of Σ loss / denominator."""
    return torch.ops.ce_kernels_linear.fused(*head, denominator, *_flat(static), wanted)


def linear_loss(head: Head, denominator: Tensor, static: Static) -> Tensor:
    """Σ loss / denominator, whose derivative has been computed with it."""
    wanted = [x is not None and x.requires_grad for x in head[:3]]
    return torch.ops.ce_kernels_linear.loss(*head, denominator, *_flat(static), wanted)[0]


def linear_grad(head: Head, upstream: Upstream, static: Static, wanted: list[bool]) -> tuple[Tensor | None, ...]:
    """dhidden, dweight, dbias, dtarget for any upstream gradients; None where not wanted."""
    found = torch.ops.ce_kernels_linear.grad(*head, *upstream, *_flat(static), wanted)
    return tuple(x if want else None for x, want in zip(found, wanted, strict=True))


def _flat(static: Static) -> tuple:
    """In the types of a schema."""
    return *flat_spec(static.spec), *static[1:]


def _static(flat: tuple) -> Static:
    return Static(spec_of(*flat[:N_SPEC]), *flat[N_SPEC:])


def _stats(*arguments):
    head, static = Head(*arguments[:5]), _static(arguments[5:-1])
    loss, lse, target_sum, predicted = linear_chunks.stats(head, static, with_argmax=arguments[-1])
    return loss, lse, target_sum, loss.new_empty(0, dtype=torch.int32) if predicted is None else predicted


def _fused(*arguments):
    head, denominator, static = Head(*arguments[:5]), arguments[5], _static(arguments[6:-1])
    out, gradients = linear_chunks.fused(head, denominator, static, arguments[-1])
    return *out[:3], *(_present(x, head) for x in gradients.finished())


def _loss(*arguments):
    loss, *others = _fused(*arguments)
    return loss.sum() / arguments[5], *others


def _watched(upstream, *_):
    """The upstream gradient. A tracer keeps what it depends on, and notices writes to that and derivatives by it."""
    return upstream.clone()


def _grad(*arguments):
    head, upstream, static = Head(*arguments[:5]), Upstream(*arguments[5:9]), _static(arguments[9:-1])
    gradients, dtarget = linear_chunks.grad(head, upstream, static, arguments[-1])
    return *(_present(x, head) for x in gradients.finished()), _present(dtarget, head)


def _present(x: Tensor | None, head: Head) -> Tensor:
    return head.hidden.new_empty(0) if x is None else x


def _fake_stats(*arguments):
    head = Head(*arguments[:5])
    n_rows = head.hidden.shape[0] if arguments[-1] else 0
    return *row_outputs(head, _static(arguments[5:-1])), head.hidden.new_empty(n_rows, dtype=torch.int32)


def _fake_fused(*arguments):
    head = Head(*arguments[:5])
    return *row_outputs(head, _static(arguments[6:-1])), *_fake_gradients(head, arguments[-1])[:3]


def _fake_loss(*arguments):
    loss, *others = _fake_fused(*arguments)
    return loss.new_empty(()), *others


def _fake_grad(*arguments):
    return _fake_gradients(Head(*arguments[:5]), arguments[-1])


def _fake_gradients(head: Head, wanted: list[bool]) -> tuple[Tensor, ...]:
    wanted = [*wanted, False][:4]
    # Contiguous, whatever the strides of the input: a bias may be an expanded number.
    return tuple(
        x.new_empty(x.shape) if want and x is not None else head.hidden.new_empty(0)
        for x, want in zip(head[:4], wanted, strict=True)
    )


def _save(ctx, inputs, output) -> None:
    """Of `stats` and of `fused`: the static part stands before the last input."""
    ctx.static = _static(inputs[-1 - N_STATIC : -1])
    ctx.save_for_backward(*inputs[:5], output[1], output[2])
    ctx.set_materialize_grads(False)
    ctx.n_inputs = len(inputs)


def _backward(ctx, dloss, dlse, *_):
    refuse_create_graph()
    *head, lse, target_sum = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:4])
    if dloss is None and dlse is None:
        return (None,) * ctx.n_inputs
    upstream = Upstream(lse, target_sum, or_zeros(dloss, lse), dlse)
    return *linear_grad(Head(*head), upstream, ctx.static, wanted), *(None,) * (ctx.n_inputs - 4)


def scaled(gradient: Tensor, g: Tensor) -> Tensor:
    """gradient · g in gradient's dtype for a 0-d g, which PyTorch alone would round to that dtype first."""
    return (gradient.to(torch.promote_types(gradient.dtype, g.dtype)) * g).to(gradient.dtype)


def _save_gradients(ctx, inputs, output) -> None:
    total, lse, target_sum, *gradients = output
    ctx.static, ctx.wanted, ctx.n_inputs = _static(inputs[6:-1]), inputs[-1], len(inputs)
    ctx.save_for_backward(*inputs[:6], total, lse, target_sum, *gradients)


def _scale_gradients(ctx, g, *_):
    refuse_create_graph()
    *head, denominator, total, lse, target_sum, dhidden, dweight, dbias = ctx.saved_tensors
    *needed, _, needs_denominator = ctx.needs_input_grad[:6]
    if all(want or not need for need, want in zip(needed, [*ctx.wanted, False], strict=True)):
        # No operator of its own, so that a compiler may multiply in place.
        g = torch.ops.ce_kernels_linear.watched(g, *head[:3])
        saved = (dhidden, dweight, dbias)
        gradients = *(scaled(x, g) if need else None for x, need in zip(saved, needed[:3], strict=True)), None
    else:
        # In an exported program more is trained than when it was made.
        upstream = Upstream(lse, target_sum, (g / denominator).expand(len(lse)), None)
        gradients = linear_grad(Head(*head), upstream, ctx.static, needed)
    return *gradients, None, -g * total / denominator if needs_denominator else None, *(None,) * (ctx.n_inputs - 6)


_FUNCTIONS = (_stats, _fused, _grad, _loss, _watched)
_FAKES = (_fake_stats, _fake_fused, _fake_grad, _fake_loss, _watched)
for _schema, _function, _fake in zip(_SCHEMAS, _FUNCTIONS, _FAKES, strict=True):
    _name = _library.define(_schema)
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    library.register_fake(f"ce_kernels_linear::{_name}", _fake, lib=_library)
for _name in ("stats", "fused"):
    library.register_autograd(f"ce_kernels_linear::{_name}", _backward, setup_context=_save, lib=_library)
library.register_autograd("ce_kernels_linear::loss", _scale_gradients, setup_context=_save_gradients, lib=_library)
