"""`patch()`: `torch.nn.functional.cross_entropy` becomes ours, for programs that cannot be edited."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function

from ce_kernels.spec import Reduction
from torch_api.losses import cross_entropy


def functional_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`torch_api.cross_entropy` with the signature of `torch.nn.functional.cross_entropy`, deprecated arguments too.

    Example:
        >>> import torch
        >>> round(functional_cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3])).item(), 4)
        1.3863
    """
    overriding = [x for x in (input, target, weight) if _overrides_functions(x)]
    if overriding:
        # Who has a rule of their own has it for PyTorch's function.
        return handle_torch_function(
            _PYTORCHS, overriding, input, target, weight=weight, size_average=size_average, ignore_index=ignore_index,
            reduce=reduce, reduction=reduction, label_smoothing=label_smoothing,
        )  # fmt: skip
    if size_average is not None or reduce is not None:
        warnings.warn("size_average and reduce are deprecated in PyTorch; write reduction=…", stacklevel=2)
        average = size_average is None or size_average
        reduction = "none" if reduce is not None and not reduce else "mean" if average else "sum"
    return cross_entropy(
        input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )


def _overrides_functions(x: Tensor | None) -> bool:
    """Whether the class of x has a `__torch_function__` of its own."""
    own = getattr(type(x), "__torch_function__", None)
    return getattr(own, "__func__", None) not in (None, Tensor.__torch_function__.__func__)


_PYTORCHS = F.cross_entropy
# Of every `patch()` that is open, what was there before, in the order of their beginnings.
_open: list[list] = []


@contextmanager
def patch() -> Iterator[None]:
    """While it lasts, `torch.nn.functional.cross_entropy`, and with it `torch.nn.CrossEntropyLoss`, is this package's.

    What was there before comes back at the end, also after an exception; of several that overlap, at the last's. It
    reaches callers that look the function up in its module (`F.cross_entropy`, as PyTorch and transformers do), in
    every thread; a name that was imported earlier (`from torch.nn.functional import cross_entropy`) stays what it was.

    Example:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> with patch():
        ...     F.cross_entropy(torch.zeros(2, 4, dtype=torch.bfloat16), torch.tensor([0, 3])).dtype
        torch.float32
        >>> F.cross_entropy(torch.zeros(2, 4, dtype=torch.bfloat16), torch.tensor([0, 3])).dtype
        torch.bfloat16
    """
    own = [F.cross_entropy]
    _open.append(own)
    F.cross_entropy = functional_cross_entropy
    try:
        yield
    finally:
        place = next(i for i, other in enumerate(_open) if other is own)
        del _open[place]
        if place == len(_open):
            F.cross_entropy = own[0]
        else:
            # One that began later is still open, and ends with what this one found.
            _open[place][0] = own[0]
