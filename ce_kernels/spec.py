r"""The contract of every loss in this package, and the options that choose among its terms.

Per row of raw logits r over V classes, in fp32 (fp64 for fp64 logits)::

    x   = logit_scale · r                 with a softcap c:  x = c · tanh(logit_scale · r / c)
    q_k = w_k · ((1 − α) · t_k + α / V)   t = onehot(label), or the row of soft targets
    s   = Σ_k q_k        lse = log Σ_k exp(x_k)        p_k = exp(x_k − lse)
    ℓ   = s · lse − Σ_k q_k · x_k + λ · lse²

    ∂ℓ/∂x_k = (s + 2λ·lse) · p_k − q_k                   then the slope of softcap and logit_scale
    ∂ℓ/∂t_k = (1 − α) · w_k · (lse − x_k)                soft targets
    ∂ℓ/∂w_k = ((1 − α) · t_k + α / V) · (lse − x_k)

w are class weights (1 when absent), α is `label_smoothing`, λ is `z_loss`. Rows whose label is `ignore_index` have
ℓ = 0 and no gradient. A logit of −inf is a masked class: it stays −inf under scale and softcap, p and the gradient are
0 there, and with q = 0 it adds nothing to ℓ. A label outside [0, V) that is not `ignore_index` makes its own row's loss
and gradient NaN.

Reductions: `none` is ℓ per row; `sum` is Σℓ; `mean` is Σℓ / Σ w_label over rows that are not ignored (hard labels),
Σℓ / number of rows (soft targets), or Σℓ / `denominator` where one is given.
"""

import math
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Literal, NoReturn

Reduction = Literal["none", "mean", "sum"]
Implementation = Literal["triton", "reference"]

REDUCTIONS = ("none", "mean", "sum")
IMPLEMENTATIONS = ("triton", "reference")


def fail(kind: type[Exception], passed: str, required: str, write: str) -> NoReturn:
    """Raises `kind` with the three parts of every message here: what was passed, what is required, what to write."""
    raise kind(f"got {passed}; required: {required}; write {write}")


@dataclass(frozen=True)
class Options:
    """The options that act on a row, as checked by `Options.checked`. Hashable: launches and traces are cached by it.

    ignore_index None ignores no label.
    """

    ignore_index: int | None = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0

    @classmethod
    def checked(
        cls,
        ignore_index: int | None,
        label_smoothing: float,
        z_loss: float,
        softcap: float | None,
        logit_scale: float,
    ) -> "Options":
        """Options from user arguments. Raises TypeError or ValueError that says what to write instead."""
        if ignore_index is not None and (not isinstance(ignore_index, Integral) or isinstance(ignore_index, bool)):
            fail(TypeError, f"ignore_index={ignore_index!r}", "an integer", "ignore_index=-100")
        label_smoothing = _number("label_smoothing", label_smoothing, "label_smoothing=0.1")
        if not 0.0 <= label_smoothing <= 1.0:
            fail(ValueError, f"label_smoothing={label_smoothing}", "a number in [0, 1]", "label_smoothing=0.1")
        z_loss = _number("z_loss", z_loss, "z_loss=1e-4")
        if not 0.0 <= z_loss < math.inf:
            fail(ValueError, f"z_loss={z_loss}", "a finite number ≥ 0", "z_loss=1e-4")
        if softcap is not None:
            softcap = _number("softcap", softcap, "softcap=30.0")
            if not 0.0 < softcap < math.inf:
                fail(ValueError, f"softcap={softcap}", "a finite number > 0, or None", "softcap=None for no cap")
        logit_scale = _number("logit_scale", logit_scale, "logit_scale=1.0")
        if not -math.inf < logit_scale < math.inf:
            fail(ValueError, f"logit_scale={logit_scale}", "a finite number", "logit_scale=1.0")
        ignored = None if ignore_index is None else int(ignore_index)
        return cls(ignored, label_smoothing, z_loss, softcap, logit_scale)

    def for_labels(self, dtype: str) -> "Options":
        """These options for labels of an integer dtype: an ignore_index that it cannot hold ignores none."""
        bits = 63 if dtype == "int64" else 31
        if self.ignore_index is None or -(2**bits) <= self.ignore_index < 2**bits:
            return self
        return replace(self, ignore_index=None)

    def scalars(self) -> dict[str, int | float | None]:
        """The kernels' scalar arguments; None where the option is off, which removes its code from the kernel."""
        return {
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing or None,
            "z_loss": self.z_loss or None,
            "logit_scale": None if self.logit_scale == 1.0 else self.logit_scale,
            "softcap": self.softcap,
        }


def _number(name: str, value: float, write: str) -> float:
    # Tensors and tracers are refused: reading one would wait for the device, and its gradient would be lost.
    if not isinstance(value, Real) or isinstance(value, bool):
        fail(TypeError, f"{name} of type {type(value).__name__}", "a Python number", write)
    return float(value)


def check_reduction(reduction: str, denominator: object) -> None:
    """Raises ValueError for an unknown reduction, or a denominator that the reduction would ignore."""
    if reduction not in REDUCTIONS:
        fail(ValueError, f"reduction={reduction!r}", "'none', 'mean' or 'sum'", "reduction='mean'")
    if denominator is not None and reduction != "mean":
        fail(
            ValueError,
            f"denominator with reduction={reduction!r}",
            "reduction='mean', whose divisor it replaces",
            "reduction='mean'",
        )


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError for an unknown implementation."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        fail(
            ValueError,
            f"implementation={implementation!r}",
            "'triton', 'reference' or None",
            "implementation=None to choose by device",
        )
