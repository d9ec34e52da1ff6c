"""A linear head's arguments, checked, as rows."""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ce_kernels import Options
from ce_kernels.checks import Facts, check_target, check_weight
from ce_kernels.linear import check_chunking, check_linear
from ce_kernels.spec import fail
from torch_api import tracing
from torch_api.arguments import divisor, facts_of
from torch_api.launch import choose_implementation
from torch_api.linear_chunks import Head, Static
from torch_api.reference import compute_dtype, counted_weights, label_weights
from torch_api.rows import Inputs, RowSpec

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


NAMES = ("hidden", "weight", "bias", "labels", "class_weight")


class LinearChoices(NamedTuple):
    """The arguments that are no tensors and no options of a row."""

    max_logits_bytes: int
    accumulation: str
    process_group: "ProcessGroup | None"
    implementation: str | None


def checked_head(head: Head, options: Options, choices: LinearChoices) -> tuple[Head, Static]:
    """The user's arrays, checked, as rows; and what is known without data."""
    check_chunking(choices.max_logits_bytes, choices.accumulation)
    _check_plain(head)
    hidden, weight, labels = (
        facts_of("hidden", head.hidden),
        facts_of("weight", head.weight),
        facts_of("labels", head.target),
    )
    n_classes = check_linear(hidden, weight, None if head.bias is None else facts_of("bias", head.bias), 0)
    logits = Facts("hidden @ weight.T", (*hidden.shape[:-1], n_classes), hidden.dtype)
    soft = check_target(logits, labels, len(logits.shape) - 1, options)
    if head.class_weight is not None:
        check_weight(facts_of("class_weight", head.class_weight), n_classes)
        if head.class_weight.requires_grad and torch.is_grad_enabled():
            passed = "class_weight that requires a gradient"
            fail(ValueError, passed, "class weights that are not trained", "class_weight.detach()")
    n_rows = math.prod(hidden.shape[:-1])
    target = head.target.reshape(n_rows, n_classes) if soft else head.target.reshape(n_rows)
    if soft and target.stride(-1) != 1:
        target = target.contiguous()
    if not soft:
        # Narrow and unsigned integers cannot hold a negative ignore_index.
        target = target if target.dtype in (torch.int32, torch.int64) else target.long()
        options = options.for_labels(facts_of("labels", target).dtype)
    rows = head._replace(
        hidden=head.hidden.reshape(n_rows, hidden.shape[-1]),
        target=target,
        class_weight=None if head.class_weight is None else head.class_weight.contiguous(),
    )
    spec = RowSpec(options, choose_implementation(choices.implementation, head.hidden.device))
    group = None
    if choices.process_group is not None:
        from torch_api import distributed

        spec = distributed.local_spec(spec, distributed.equal_shards(n_classes, choices.process_group))
        group = choices.process_group.group_name
    return rows, Static(spec, int(choices.max_logits_bytes), choices.accumulation, _logits_dtype(head), group)


def check_tensors(head: Head) -> None:
    """Raises TypeError unless the arguments are tensors."""
    for name, x in zip(NAMES, head, strict=True):
        if not isinstance(x, Tensor) and not (x is None and name in ("bias", "class_weight")):
            fail(TypeError, f"{name} of type {type(x).__name__}", "a torch.Tensor", f"torch.as_tensor({name})")


def _check_plain(head: Head) -> None:
    """Raises TypeError or ValueError unless the arguments are plain tensors on one device."""
    check_tensors(head)
    for name, x in zip(NAMES, head, strict=True):
        if x is None:
            continue
        if tracing.is_dtensor(x):
            fail(
                TypeError,
                f"{name} of type DTensor with plain hidden",
                "plain tensors, or hidden as a DTensor, which says whose rows are whose",
                "the call inside the forward of a module whose parameters FSDP2 gathers, or its unshard() before; or "
                "DTensor.from_local(hidden, weight.device_mesh, [Shard(0)]) where every process has rows of its own, "
                "[Replicate()] where all have the same",
            )
        if x.device != head.hidden.device:
            passed = f"{name} on {x.device} with hidden on {head.hidden.device}"
            fail(ValueError, passed, "one device", f"{name}.to(hidden.device)")


def _logits_dtype(head: Head) -> torch.dtype:
    """The dtype of `hidden @ weight.T + bias`: autocast's, or the one that all of them have."""
    operands = [x for x in head[:3] if x is not None]
    device = head.hidden.device.type
    # Autocast leaves float64 alone.
    # What compilers cannot trace on every version they need not ask: where they work, autocast is available.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    if available and torch.is_autocast_enabled(device) and not any(x.dtype == torch.float64 for x in operands):
        return torch.get_autocast_dtype(device)
    for name, x in (("weight", head.weight), ("bias", head.bias)):
        if x is not None and x.dtype != head.hidden.dtype:
            passed = f"{facts_of(name, x)} with {facts_of('hidden', head.hidden)}"
            fail(TypeError, passed, "one dtype, or autocast", f"{name}.to(hidden.dtype)")
    return head.hidden.dtype


def divided_by(head: Head, static: Static, denominator: float | Tensor | None) -> Tensor:
    """The 0-d divisor of `mean`, on the device, without reading it."""
    # Of the logits only dtype and device are asked for.
    nothing = head.hidden.new_empty(0, dtype=static.dtype)
    inputs = Inputs(nothing, head.target, head.class_weight)
    weighted = head.class_weight is not None and not head.target.is_floating_point()
    if static.group is not None and weighted and denominator is None:
        return _label_mass(inputs, static).sum()
    by = divisor(inputs, static.spec, denominator)
    return by if isinstance(by, Tensor) else torch.full((), by, dtype=compute_dtype(nothing), device=nothing.device)


def _label_mass(inputs: Inputs, static: Static) -> Tensor:
    """The weight of every row's label, wherever in the sharded vocabulary it is; 0 for rows that are ignored."""
    from torch.distributed import _functional_collectives

    spec = static.spec
    assert spec.vocab_start is not None
    assert spec.total_classes is not None
    own = label_weights(inputs, spec.vocab_start, compute_dtype(inputs.logits))
    whole = _functional_collectives.all_reduce(own, "sum", static.group)  # pyright: ignore[reportArgumentType]
    return counted_weights(whole, inputs, spec.options, spec.total_classes)
