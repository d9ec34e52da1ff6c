"""Who is watching: nobody, transforms of torch.func, or a tracer. The one file that asks PyTorch's internals."""

import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

# Of `is_grads_batched=True`, which vmaps a backward without torch.func.
_BATCHED: Any = torch._C._parse_dispatch_key("Batched")
_PLAIN = frozenset((Tensor, Parameter, type(None)))
_NO_DISPATCH: Any = torch._C._disabled_torch_dispatch_impl
_FUNCTORCH: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]


def is_eager(*tensors: Tensor | None) -> bool:
    """Nothing but autograd sees the operations on these tensors: no transform, no tracer, no subclass."""
    # A list: every call asks, and a generator takes three times as long.
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
    ) and not [x for x in tensors if type(x) not in _PLAIN]


def has_values(*tensors: Tensor) -> bool:
    """As `is_eager`, and of subclasses too, as long as they hold what PyTorch's operations read."""
    kinds: list[Any] = [type(x) for x in tensors]
    return is_eager() and not [kind for kind in kinds if kind.__torch_dispatch__ is not _NO_DISPATCH]


def is_opaque(*tensors: Tensor | None) -> bool:
    """A tracer or a subclass must see an operation with a name and a fake, and not a kernel's launch."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or any(type(x) not in _PLAIN for x in tensors)
    )


def is_transformed() -> bool:
    """Whether torch.func's transforms or forward mode are at work."""
    return torch._C._are_functorch_transforms_active() or is_forward_mode()


def has_symbols(shape: torch.Size) -> bool:
    """Whether a tracer may not know some of these sizes."""
    return torch.compiler.is_compiling() or any(isinstance(size, torch.SymInt) for size in shape)


def is_forward_mode() -> bool:
    """Whether tensors may carry tangents."""
    return forward_ad._current_level >= 0


def is_batched(*tensors: Tensor | None) -> bool:
    """Whether a tensor is many, mapped by `torch.autograd.grad(…, is_grads_batched=True)`."""
    return bool([x for x in tensors if x is not None and torch._C._dispatch_keys(x).has(_BATCHED)])


def is_dtensor(x: object) -> bool:
    """Whether x is a DTensor, whose module is loaded where there is one."""
    if type(x) is Tensor or type(x) is Parameter:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def is_higher_order() -> bool:
    """Forward mode, nested derivatives of torch.func, torch.func in compile: a Function has no rule for those."""
    if is_forward_mode():
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    if torch.compiler.is_compiling():
        return True
    kinds = _FUNCTORCH.TransformType
    levels = [level.key() for level in _FUNCTORCH.get_interpreter_stack() or ()]
    return kinds.Jvp in levels or levels.count(kinds.Grad) > 1
