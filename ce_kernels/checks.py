"""Checks of shapes and dtypes, with one wording for both front ends. They see names, shapes and dtype names only."""

import math
from numbers import Integral, Real
from typing import NamedTuple, NoReturn

from ce_kernels.spec import Options, fail

FLOATS = ("float16", "bfloat16", "float32", "float64")
# No uint64: it holds labels that no other integer can, and would wrap.
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")


class Facts(NamedTuple):
    """What a check needs to know of an argument: its name in the user's call, its shape, the name of its dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}"


def check_logits(logits: Facts, axis: int) -> int:
    """The class axis counted from 0. TypeError for non-float logits, ValueError for a bad rank or axis, or no class."""
    if logits.dtype not in FLOATS:
        fail(TypeError, str(logits), f"floating point {logits.name}: {', '.join(FLOATS)}", f"{logits.name} as float32")
    if not isinstance(axis, Integral) or isinstance(axis, bool):
        fail(TypeError, f"class axis {axis!r}", "an integer", "-1 for classes last")
    rank = len(logits.shape)
    if rank == 0:
        fail(ValueError, str(logits), "a class axis", f"{logits.name} of shape [rows, classes]")
    if not -rank <= axis < rank:
        fail(ValueError, f"class axis {axis} for {logits}", f"an axis in [{-rank}, {rank})", "-1 for classes last")
    axis %= rank
    if logits.shape[axis] == 0:
        fail(ValueError, str(logits), "at least one class", f"{logits.name} with a class axis longer than 0")
    return axis


def check_target(logits: Facts, target: Facts, axis: int, options: Options) -> bool:
    """True for soft targets, False for class indices. Raises TypeError or ValueError where target is neither."""
    rows = logits.shape[:axis] + logits.shape[axis + 1 :]
    if target.shape == logits.shape:
        if target.dtype not in FLOATS:
            fail(
                TypeError,
                f"{target}, of the shape of {logits.name}",
                "floating point class probabilities in that shape",
                f"{target.name} of shape {list(rows)} for class indices",
            )
        if options.ignore_index not in (None, -100):
            fail(
                ValueError,
                f"ignore_index={options.ignore_index} with soft targets",
                "class indices, which alone can be ignored",
                f"zeros in the rows of {target.name} to leave out",
            )
        return True
    if target.shape != rows:
        fail(
            ValueError,
            f"{target} with {logits}",
            f"{target.name} of shape {list(rows)} (class indices) or {list(logits.shape)} (probabilities)",
            f"{target.name} with one entry a row, and the class axis where it is",
        )
    check_class_indices(target)
    return False


def check_class_indices(target: Facts) -> None:
    """Raises TypeError unless target holds integers."""
    if target.dtype not in INTEGERS:
        fail(TypeError, str(target), "integer class indices", f"{target.name} as int32 or int64")


def check_weight(weight: Facts, n_classes: int) -> None:
    """Raises TypeError or ValueError unless weight is a floating point vector with one entry a class."""
    if weight.dtype not in FLOATS:
        fail(TypeError, str(weight), "floating point class weights", f"{weight.name} as float32")
    if weight.shape != (n_classes,):
        fail(
            ValueError, str(weight), f"one weight a class: shape [{n_classes}]", f"{weight.name} of that shape, or None"
        )


def is_number(value: object) -> bool:
    """Whether value is a Python or NumPy real number; bool is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_denominator(denominator: Facts) -> None:
    """Raises TypeError or ValueError unless the array is one number."""
    if denominator.dtype not in FLOATS + INTEGERS:
        fail(TypeError, str(denominator), "a number", f"{denominator.name} as float32")
    if math.prod(denominator.shape) != 1 or len(denominator.shape) > 1:
        fail(ValueError, str(denominator), "one number", f"{denominator.name}.sum() if it holds counts to be added")


def denominator_error(denominator: object) -> NoReturn:
    """Raises the TypeError of a denominator that is neither a number nor an array."""
    passed = f"denominator of type {type(denominator).__name__}"
    fail(TypeError, passed, "a number or an array of one", "denominator=float(count)")


def label_error(name: str, label: int, n_classes: int) -> NoReturn:
    """Raises the IndexError of a label that is no class, where checking costs no device synchronisation."""
    fail(
        IndexError,
        f"label {label} in {name}",
        f"labels in [0, {n_classes}) or ignore_index",
        "ignore_index for rows to leave out",
    )
