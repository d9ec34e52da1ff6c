"""What both front ends decide of a linear head without data: its checks, and how many rows of logits it holds at once.

Logits are hidden [N, D] times weight, and only a chunk of rows of them exists at a time.
"""

from numbers import Integral
from typing import Literal

from ce_kernels.checks import FLOATS, Facts
from ce_kernels.spec import fail

Accumulation = Literal["float32", "parameter"]

ACCUMULATIONS = ("float32", "parameter")
# 2048 rows of 151936 bf16 classes: matmuls of fewer rows leave multiprocessors idle; with it, less than 0.6 GiB in all.
MAX_LOGITS_BYTES = 600 * 2**20
# Rows of a matmul's tile.
ROW_MULTIPLE = 128


def chunk_rows(n_rows: int, n_classes: int, itemsize: int, max_logits_bytes: int, *, equal: bool = False) -> int:
    """Rows in a chunk: chunks as even as multiples of 128 allow, each within max_logits_bytes. ValueError below a row.

    equal: the last chunk is as long as the others, and goes over some rows again: as few as pay for themselves.

    >>> chunk_rows(8192, 128256, 2, MAX_LOGITS_BYTES), chunk_rows(16384, 151936, 2, MAX_LOGITS_BYTES)
    (2048, 2048)
    >>> chunk_rows(32768, 262144, 2, MAX_LOGITS_BYTES), chunk_rows(32768, 262144, 2, MAX_LOGITS_BYTES, equal=True)
    (1152, 1024)
    >>> chunk_rows(10, 100, 4, MAX_LOGITS_BYTES), chunk_rows(10, 100, 4, 1200)
    (10, 3)
    """
    most = max_logits_bytes // (n_classes * itemsize)
    if most < 1:
        passed = f"max_logits_bytes={max_logits_bytes} for rows of {n_classes} classes of {itemsize} bytes"
        fail(ValueError, passed, "room for a row", f"max_logits_bytes={n_classes * itemsize} or more")
    if most >= n_rows:
        return max(n_rows, 1)
    multiple = ROW_MULTIPLE if most >= ROW_MULTIPLE else 1
    most -= most % multiple
    if equal and multiple > 1:
        # Adding to the gradient of the weight takes each chunk as long as about 128 rows (H200).
        return min(range(most, 0, -multiple), key=lambda rows: -(-n_rows // rows) * (rows + multiple))
    even = -(-n_rows // -(-n_rows // most))
    return min(most, -(-even // multiple) * multiple)


def check_chunking(max_logits_bytes: object, accumulation: str) -> None:
    """Raises TypeError or ValueError unless the budget is a positive integer and the accumulation one of its names."""
    if not isinstance(max_logits_bytes, Integral) or isinstance(max_logits_bytes, bool):
        passed = f"max_logits_bytes of type {type(max_logits_bytes).__name__}"
        fail(TypeError, passed, "an integer", f"max_logits_bytes={MAX_LOGITS_BYTES}")
    if max_logits_bytes < 1:
        passed = f"max_logits_bytes={max_logits_bytes}"
        fail(ValueError, passed, "a positive number of bytes", f"max_logits_bytes={MAX_LOGITS_BYTES}")
    if accumulation not in ACCUMULATIONS:
        fail(ValueError, f"accumulation={accumulation!r}", "'float32' or 'parameter'", "accumulation='float32'")


def check_linear(hidden: Facts, weight: Facts, bias: Facts | None, class_axis: int) -> int:
    """V, the number of classes. TypeError or ValueError unless hidden [..., D] and weight make logits [..., V]."""
    for facts in (hidden, weight) if bias is None else (hidden, weight, bias):
        if facts.dtype not in FLOATS:
            fail(TypeError, str(facts), f"floating point {facts.name}: {', '.join(FLOATS)}", f"{facts.name} as float32")
    if isinstance(class_axis, bool) or class_axis not in (0, 1):
        passed = f"class_axis={class_axis!r}"
        fail(ValueError, passed, "0 for a weight [V, D] or 1 for a weight [D, V]", "class_axis=1")
    layout = "[D, V]" if class_axis else "[V, D]"
    if len(weight.shape) != 2:
        fail(ValueError, str(weight), f"a matrix {layout}", f"{weight.name} with two axes")
    n_classes, width = weight.shape[class_axis], weight.shape[1 - class_axis]
    if n_classes == 0:
        fail(ValueError, str(weight), "at least one class", f"{weight.name} {layout} with V longer than 0")
    if not hidden.shape or hidden.shape[-1] != width:
        # A weight that lies the other way is the likelier mistake where that would fit.
        swapped = bool(hidden.shape) and hidden.shape[-1] == n_classes
        turned = f"{weight.name} transposed (in JAX: class_axis={1 - class_axis})"
        fail(
            ValueError,
            f"{hidden} with {weight}",
            f"{hidden.name} [..., D] and {weight.name} {layout} with the same D",
            turned if swapped else f"{hidden.name} whose last axis has {width} entries",
        )
    if bias is not None and bias.shape != (n_classes,):
        fail(ValueError, str(bias), f"one bias a class: shape [{n_classes}]", f"{bias.name} of that shape, or None")
    return n_classes
