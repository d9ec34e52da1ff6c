"""The one table of cases that runs through every front end and implementation, and what their arrays look like."""

from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

from benchmarks.shapes import GEMMA, GPT2, LLAMA2, LLAMA3, QWEN
from tests import oracle

NUMPY = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
# Unit roundoff: half the distance from 1 to the next number.
ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-1022}


@dataclass(frozen=True)
class Case:
    """One problem: n_rows × n_classes logits of a dtype and spread sigma, the labels' pattern, and the loss's options.

    labels: "hard", "ignored" (some rows), "all_ignored", "invalid" (some out of range), "soft", "one_hot" (soft).
    logits: "normal", "masked" (−inf classes, never the label), "masked_tile" (a long run of −inf),
    "masked_start" (the first half), "lowest" (classes masked by the dtype's lowest number), "confident".
    """

    name: str
    n_rows: int
    n_classes: int
    dtype: str = "float32"
    sigma: float = 2.0
    labels: str = "ignored"
    logits: str = "normal"
    weighted: bool = False
    label_dtype: str = "int64"
    options: dict = field(default_factory=dict)

    @property
    def soft(self) -> bool:
        return self.labels in ("soft", "one_hot")


ALL = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 20.0, "logit_scale": 0.7}

CASES = [
    *(Case(f"classes_{v}", 5, v) for v in (1, 2, 3, 127, 128, 1000, 1025)),
    *(Case(f"vocabulary_{v}", 2, v, "bfloat16", labels="hard") for v in (GPT2, LLAMA2, LLAMA3, QWEN, GEMMA)),
    *(Case(f"{dtype}_{sigma:g}", 6, 300, dtype, sigma) for dtype in NUMPY for sigma in (0.1, 1.0, 20.0)),
    Case("one_row", 1, 50),
    Case("no_rows", 0, 50),
    Case("int32_labels", 6, 90, label_dtype="int32"),
    Case("all_ignored", 4, 60, labels="all_ignored"),
    Case("ignore_index_0", 12, 7, labels="hard", options={"ignore_index": 0}),
    Case("ignore_index_1", 12, 7, labels="hard", options={"ignore_index": 1}),
    Case("ignore_index_beyond_labels", 12, 7, labels="hard", label_dtype="int32", options={"ignore_index": 2**40}),
    Case("int8_labels", 12, 7, labels="hard", label_dtype="int8"),
    Case("uint8_labels", 12, 7, labels="hard", label_dtype="uint8"),
    Case("ignore_index_none", 12, 7, labels="hard", options={"ignore_index": None}),
    Case("invalid_labels", 6, 40, labels="invalid"),
    Case("invalid_labels_all_options", 6, 40, labels="invalid", weighted=True, options=ALL),
    Case("smoothing", 6, 200, options={"label_smoothing": 0.1}),
    Case("smoothing_1", 6, 200, options={"label_smoothing": 1.0}),
    Case("z_loss", 6, 200, options={"z_loss": 1e-2}),
    Case("softcap", 6, 200, sigma=20.0, options={"softcap": 15.0}),
    Case("scale", 6, 200, options={"logit_scale": 0.3}),
    Case("negative_scale", 6, 200, options={"logit_scale": -1.5}),
    Case("weight", 8, 200, weighted=True),
    Case("weight_smoothing", 8, 200, weighted=True, options={"label_smoothing": 0.2}),
    Case("all_options", 8, 200, weighted=True, options=ALL),
    Case("all_options_bf16", 8, 200, "bfloat16", weighted=True, options=ALL),
    Case("all_options_fp16", 8, 200, "float16", weighted=True, options=ALL),
    Case("all_options_fp64", 8, 200, "float64", weighted=True, options=ALL),
    Case("masked", 6, 300, logits="masked"),
    Case("masked_tile", 4, 2100, logits="masked_tile"),
    Case("lowest", 6, 300, logits="lowest"),
    Case("lowest_bf16", 6, 300, "bfloat16", logits="lowest"),
    Case("masked_all_options", 6, 300, logits="masked", options={**ALL, "label_smoothing": 0.0}),
    Case("masked_negative_scale", 6, 300, logits="masked", options={"logit_scale": -1.0}),
    Case("masked_capped_zero_scale", 6, 300, logits="masked", options={"logit_scale": 0.0, "softcap": 15.0}),
    Case("confident", 6, 300, sigma=1.0, logits="confident"),
    Case("soft", 6, 200, labels="soft"),
    Case("soft_one_hot", 6, 200, labels="one_hot"),
    Case("soft_weight", 6, 200, labels="soft", weighted=True),
    Case("soft_all_options", 6, 200, labels="soft", weighted=True, options=ALL),
    Case("soft_all_options_bf16", 6, 200, "bfloat16", labels="soft", weighted=True, options=ALL),
    Case("soft_all_options_fp64", 6, 200, "float64", labels="soft", weighted=True, options=ALL),
    Case("soft_masked", 6, 300, labels="soft", logits="masked"),
    Case("soft_shifted", 3, 2101, "bfloat16", labels="soft"),
    Case("soft_shifted_all_options", 3, 301, "float16", labels="soft", weighted=True, options=ALL),
]

# Long enough for several steps of rows that are spread over multiprocessors, or that programs share.
LONG_CASES = [
    Case("long_masked_start", 3, 1000, logits="masked_start"),
    Case("long", 3, 4200, "bfloat16"),
    Case("long_shifted", 3, 4201, "bfloat16"),
    Case("long_smoothing", 3, 4200, options={"label_smoothing": 0.1}),
    Case("long_weight_smoothing", 3, 2100, weighted=True, options={"label_smoothing": 0.2}),
    Case("long_soft", 2, 4200, "bfloat16", labels="soft"),
    Case("long_soft_shifted", 2, 4201, "bfloat16", labels="soft"),
    Case("long_lowest", 3, 2100, "bfloat16", logits="lowest"),
    Case("long_confident", 3, 2100, sigma=1.0, logits="confident"),
    Case("long_masked_low", 3, 1000, logits="masked_low"),
    Case("long_ignored", 4, 2100, labels="ignored"),
    Case("long_many", 17, 1300, "bfloat16"),
    Case("long_shifted_edge", 9, 1023, "bfloat16"),
    Case("long_scale", 6, 1300, "bfloat16", options={"z_loss": 1e-2, "logit_scale": -0.5}),
    Case("long_fp64", 3, 2100, "float64", options={"label_smoothing": 0.1}),
]


@dataclass
class Arrays:
    """A case's inputs in NumPy, rounded to its dtype: logits [N, V], target [N] or [N, V], weight [V] or None."""

    logits: np.ndarray
    target: np.ndarray
    weight: np.ndarray | None


def make(case: Case) -> Arrays:
    """The case's arrays, the same every time."""
    rng = np.random.default_rng(list(case.name.encode()))
    shape = (case.n_rows, case.n_classes)
    logits = (rng.normal(size=shape) * case.sigma).astype(NUMPY[case.dtype])
    labels = rng.integers(0, case.n_classes, case.n_rows).astype(case.label_dtype)
    rows = np.arange(case.n_rows)
    if case.logits == "masked":
        logits[rng.random(shape) < 0.3] = -np.inf
        logits[rows, labels] = 1.0
    if case.logits == "lowest":
        logits[rng.random(shape) < 0.3] = ml_dtypes.finfo(NUMPY[case.dtype]).min
        logits[rows, labels] = 1.0
    if case.logits in ("masked_tile", "masked_start", "masked_low"):
        logits -= 200 * (case.logits == "masked_low")
        logits[:, 5 * (case.logits == "masked_tile") : case.n_classes // 2] = -np.inf
        labels[:] = case.n_classes - 1
    if case.logits == "confident":
        logits[rows, labels] = 90.0
    if case.labels in ("ignored", "invalid"):
        labels[1::3] = -100
    if case.labels == "invalid":
        labels[:3] = (-1, case.n_classes, -(2**20))[: case.n_rows]
    if case.labels == "all_ignored":
        labels[:] = -100
    target = labels
    if case.labels == "one_hot":
        target = np.eye(case.n_classes, dtype=NUMPY[case.dtype])[labels]
    if case.labels == "soft":
        e = np.exp(rng.normal(size=shape))
        target = (e / e.sum(-1, keepdims=True)).astype(NUMPY[case.dtype])
    weight = None
    if case.weighted:
        weight = rng.uniform(0.5, 2.0, case.n_classes).astype(np.float32)
        weight[:: max(2, case.n_classes // 5)] = 0.0
    return Arrays(logits, target, weight)


def oracle_options(case: Case, weight: np.ndarray | None) -> oracle.Options:
    return oracle.Options(weight=None if weight is None else weight.astype(np.float64), **case.options)


def error_constant(logits: np.ndarray, options: oracle.Options) -> float:
    """c of the bounds: exp turns an absolute error of its argument, about |x|·ε, into a relative one of p.

    A soft cap works in units of itself. Measured: 11 at |x| ≤ 5; at |x| ≤ 70, where p goes down to e⁻⁷⁰, 154 on an
    H200 and 65 in plain fp32 PyTorch; 25 with a soft cap of 20.
    """
    finite = np.abs(logits.astype(np.float64))
    finite = finite[finite < 1e30]  # not what only masks
    largest = (finite.max() if finite.size else 0.0) * abs(options.logit_scale)
    return 16.0 + 3.0 * max(largest, options.softcap or 0.0)
