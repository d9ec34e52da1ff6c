"""linear_cross_entropy in both front ends against the float64 oracle with a linear layer on top of it."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

import ce_kernels.linear
from ce_kernels.linear import chunk_rows
from tests import oracle
from tests.cases import ALL, NUMPY, ROUNDOFF, SMALLEST, Arrays, Case, make, oracle_options
from tests.conftest import HAS_GPU
from tests.frontends import FRONTENDS, each_frontend
from tests.test_contract import assert_close, loss_bound


@dataclass(frozen=True)
class LinearCase:
    """A case of rows whose logits are hidden [N, width] · weightᵀ (+ bias); chunk: the rows that the budget holds."""

    rows: Case
    chunk: int = 4
    width: int = 8
    bias: bool = False
    accumulation: str = "float32"

    @property
    def max_logits_bytes(self) -> int:
        return self.chunk * self.rows.n_classes * np.dtype(NUMPY[self.rows.dtype]).itemsize


# Ten rows in chunks of four leave two rows over.
CASES = [
    LinearCase(Case("float64", 10, 60, "float64"), bias=True),
    LinearCase(Case("float64_all_options", 10, 60, "float64", weighted=True, options=ALL), bias=True),
    LinearCase(Case("float32", 10, 60)),
    LinearCase(Case("float32_all_options", 10, 60, weighted=True, options=ALL), bias=True),
    LinearCase(Case("bfloat16_all_options", 10, 60, "bfloat16", weighted=True, options=ALL), bias=True),
    LinearCase(Case("bfloat16_parameter", 10, 60, "bfloat16"), accumulation="parameter"),
    LinearCase(Case("float16", 10, 60, "float16", options={"label_smoothing": 0.1})),
    LinearCase(Case("soft", 10, 60, labels="soft", weighted=True, options=ALL), bias=True),
    LinearCase(Case("soft_bfloat16", 10, 60, "bfloat16", labels="soft")),
    LinearCase(Case("one_chunk", 10, 60), chunk=1000),
    LinearCase(Case("one_row_left_over", 10, 60, "float64", labels="hard"), chunk=3, bias=True),
    LinearCase(Case("one_row_a_chunk", 5, 60), chunk=1),
    LinearCase(Case("one_row", 1, 60)),
    LinearCase(Case("no_rows", 0, 60), bias=True),
    LinearCase(Case("one_class", 5, 1), bias=True),
    LinearCase(Case("all_ignored", 6, 60, labels="all_ignored")),
    LinearCase(Case("ignore_index_none", 10, 7, labels="hard", options={"ignore_index": None})),
    LinearCase(Case("uint8_labels", 10, 7, labels="hard", label_dtype="uint8")),
    LinearCase(Case("invalid_labels", 10, 40, labels="invalid"), bias=True),
]
# Too many rows for the interpreter.
LONG = LinearCase(Case("chunks_of_128", 257, 5, "float64"), chunk=130, bias=True)
BY_NAME = {case.rows.name: case for case in CASES}


@dataclass
class Problem:
    """hidden [N, D], weight [V, D], bias [V] or None, and the rows' arrays with the exact logits in float64."""

    hidden: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    rows: Arrays

    @property
    def inputs(self) -> list[np.ndarray]:
        return [self.hidden, self.weight, *([] if self.bias is None else [self.bias])]


def make_problem(case: LinearCase) -> Problem:
    rng = np.random.default_rng(list(case.rows.name.encode()))
    dtype, n_classes = NUMPY[case.rows.dtype], case.rows.n_classes
    hidden = rng.normal(size=(case.rows.n_rows, case.width)).astype(dtype)
    weight = (rng.normal(size=(n_classes, case.width)) * case.rows.sigma / case.width**0.5).astype(dtype)
    bias = rng.normal(size=n_classes).astype(dtype) if case.bias else None
    wide = [x.astype(np.float64) for x in (hidden, weight, np.zeros(n_classes) if bias is None else bias)]
    return Problem(hidden, weight, bias, replace(make(case.rows), logits=wide[0] @ wide[1].T + wide[2]))


def call(frontend, case: LinearCase, problem: Problem, function, **options):
    """function of the front end on hidden, weight, bias (, soft targets), weight as [V, D] here and as Flax's there."""
    rows = problem.rows
    class_weight = None if rows.weight is None else frontend.array(rows.weight)
    labels = None if case.rows.soft else frontend.array(rows.target)
    options |= case.rows.options
    options |= {"max_logits_bytes": case.max_logits_bytes, "accumulation": case.accumulation}

    def run(hidden, weight, *rest):
        rest = list(rest)
        bias = rest.pop(0) if problem.bias is not None else None
        target = rest.pop(0) if case.rows.soft else labels
        if frontend.api.__name__ == "jax_api":
            weight = weight.T
        return getattr(frontend.api, function)(
            hidden, weight, target, bias, class_weight, implementation=frontend.implementation, **options
        )

    return run


def logit_errors(case: LinearCase, problem: Problem) -> np.ndarray:
    """By how much each logit may be off: rounding to its dtype, and the sum over D in the compute dtype."""
    h, w = np.abs(problem.hidden.astype(np.float64)), np.abs(problem.weight.astype(np.float64))
    terms = h @ w.T + (0 if problem.bias is None else np.abs(problem.bias.astype(np.float64)))
    compute = "float64" if case.rows.dtype == "float64" else "float32"
    # Twice the rounding: a product rounded before the bias is added, and the interpreter, which truncates.
    return 2 * ROUNDOFF[case.rows.dtype] * (np.abs(problem.rows.logits) + terms) + (
        (case.width + 2) * ROUNDOFF[compute] * terms
    )


def check(frontend, case: LinearCase, problem: Problem, dloss, dlse, value, expected_value, each, grads) -> None:
    """Rows' or reduced losses and the gradients within what rounding can produce."""
    rows, options = problem.rows, oracle_options(case.rows, problem.rows.weight)
    compute = "float64" if case.rows.dtype == "float64" else "float32"
    exact = oracle.rows(rows.logits, rows.target, options)
    off = logit_errors(case, problem) * abs(options.logit_scale)
    worst = off.max(1, initial=0)
    z = options.z_loss
    bound = loss_bound(rows, options, exact, compute) if case.rows.n_rows else np.zeros(0)
    bound = bound + 2 * np.abs(exact.target_sum) * worst + z * (2 * np.abs(exact.lse) + worst) * worst
    assert value.dtype == compute
    assert value.shape == np.shape(expected_value)
    with np.errstate(invalid="ignore"):
        total = bound if each is None else np.sum(np.where(each == 0, 0, np.abs(each) * bound))
    assert_close(value, expected_value, total)

    u = ROUNDOFF[case.rows.dtype] * (2 if frontend.implementation == "triton" and not HAS_GPU else 1)
    c = 16.0 + 3.0 * max(np.abs(rows.logits).max(initial=0), options.softcap or 0.0)
    right = oracle.gradients(rows.logits, rows.target, options, dloss, dlse, unit_roundoff_out=2 * u,
                             unit_roundoff=ROUNDOFF[compute], c=c)  # fmt: skip
    plain = oracle.gradients(rows.logits, rows.target, options, dloss, dlse, unit_roundoff_out=0, unit_roundoff=1, c=1)
    cap = 0.0 if options.softcap is None else 2 * worst / options.softcap
    # The terms a·p and b·q of dlogits, times the relative change of p, of a and of the slope.
    wrong = right.dlogits_bound + plain.dlogits_bound * np.expm1(2 * worst + cap + 4 * z * worst)[:, None]
    wrong += SMALLEST[case.rows.dtype] * (1 + np.abs(dloss).max(initial=0))
    check_linear_gradients(case, problem, right.dlogits, wrong, grads)
    if case.rows.soft:
        relative = u * np.abs(right.dtarget) + np.abs(dloss)[:, None] * (4 * c * ROUNDOFF[compute] + 4 * off)
        assert_close(grads[-1], right.dtarget, relative)


def check_linear_gradients(case: LinearCase, problem: Problem, dlogits, wrong, grads) -> None:
    h, w = problem.hidden.astype(np.float64), problem.weight.astype(np.float64)
    u = 2 * ROUNDOFF[case.rows.dtype]
    sums = ROUNDOFF["float64" if case.rows.dtype == "float64" else "float32"]
    if case.accumulation == "parameter":
        sums = u
    with np.errstate(invalid="ignore"):
        size = np.abs(dlogits)
        for name, got, exact, error, terms in (
            ("hidden", grads[0], dlogits @ w, wrong @ np.abs(w), size @ np.abs(w)),
            ("weight", grads[1], dlogits.T @ h, wrong.T @ np.abs(h), size.T @ np.abs(h)),
            ("bias", grads[2] if case.bias else None, dlogits.sum(0), wrong.sum(0), size.sum(0)),
        ):
            if got is not None:
                assert got.dtype == problem.hidden.dtype, name
                length = len(h) if name != "hidden" else len(w)
                assert_close(got, exact, error + u * np.abs(exact) + length * sums * terms + SMALLEST[case.rows.dtype])


def check_reduction(frontend, case: LinearCase, reduction: str) -> None:
    problem = make_problem(case)
    rows, options = problem.rows, oracle_options(case.rows, problem.rows.weight)
    exact = oracle.rows(rows.logits, rows.target, options)
    expected = oracle.reduce(exact, rows.target, options, reduction)
    rng = np.random.default_rng(0)
    if reduction == "none":
        g = dloss = rng.normal(size=case.rows.n_rows) * (np.arange(case.rows.n_rows) != 3)
        each = None
    else:
        g = np.asarray(-1.5)
        each = oracle.upstream(rows.target, options, reduction)
        dloss = g * each
    function = call(frontend, case, problem, "linear_cross_entropy", reduction=reduction)
    inputs = problem.inputs + ([rows.target] if case.rows.soft else [])
    (value,), grads = frontend.differentiate(lambda *x: (function(*x),), (g,), *inputs)
    check(frontend, case, problem, dloss, None, value, expected, each, grads)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.rows.name)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@each_frontend
def test_linear_cross_entropy(frontend, reduction, case):
    if case.rows.labels == "invalid" and frontend.device == "cpu" and frontend.api.__name__ == "torch_api":
        with pytest.raises(IndexError, match=r"got label -1 in labels; required: labels in \[0, 40\)"):
            check_reduction(frontend, case, reduction)
        return
    check_reduction(frontend, case, reduction)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("frontend", [f for f in FRONTENDS if "interpreter" not in str(f.id)])
def test_chunks_of_128_rows(frontend, reduction):
    check_reduction(frontend, LONG, reduction)


@pytest.mark.parametrize("name", ["float32_all_options", "soft"])
@each_frontend
def test_sum(frontend, name):
    check_reduction(frontend, BY_NAME[name], "sum")


@pytest.mark.parametrize("name", ["float64_all_options", "bfloat16_parameter", "soft"])
@pytest.mark.parametrize("through", ["both", "lse"])
@each_frontend
def test_rows(frontend, through, name):
    case = BY_NAME[name]
    problem = make_problem(case)
    rows, options = problem.rows, oracle_options(case.rows, problem.rows.weight)
    exact = oracle.rows(rows.logits, rows.target, options)
    dloss, dlse = np.random.default_rng(1).normal(size=(2, case.rows.n_rows))
    dloss = dloss if through == "both" else 0 * dloss
    function = call(frontend, case, problem, "linear_cross_entropy_rows")
    inputs = problem.inputs + ([rows.target] if case.rows.soft else [])
    upstream = (dloss if through == "both" else None, dlse, None)
    (loss, lse, predicted), grads = frontend.differentiate(function, upstream, *inputs)
    grads = [np.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True)]
    check(frontend, case, problem, dloss, dlse, loss, exact.loss, None, grads)
    off = logit_errors(case, problem).max(1)
    assert_close(lse, exact.lse, 1e-5 * (1 + np.abs(exact.lse)) + off)
    chosen = np.take_along_axis(rows.logits, predicted[:, None].astype(int), 1)[:, 0]
    assert_close(chosen, rows.logits.max(1), 2 * off)


@pytest.mark.parametrize("kind", ["number", "array"])
@each_frontend
def test_denominator(frontend, kind):
    case = BY_NAME["float64_all_options"]
    problem = make_problem(case)
    divisor = 7.0 if kind == "number" else frontend.array(np.float32(7.0))
    total = call(frontend, case, problem, "linear_cross_entropy", reduction="sum")
    mean = call(frontend, case, problem, "linear_cross_entropy", denominator=divisor)
    (a,), da = frontend.differentiate(lambda *x: (total(*x),), (np.asarray(1 / 7.0),), *problem.inputs)
    (b,), db = frontend.differentiate(lambda *x: (mean(*x),), (np.asarray(1.0),), *problem.inputs)
    np.testing.assert_allclose(a / 7.0, b, rtol=1e-14)
    for x, y in zip(da, db, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-17)


@pytest.mark.parametrize("shape", [(1, 7), (128, 7), (129, 7), (1000, 13), (8193, 128256), (5, 300000)])
@pytest.mark.parametrize("budget", [1, 3, 127, 128, 129, 1000, 10**6])
def test_chunks_are_within_the_budget_and_cover_all_rows(shape, budget):
    n_rows, n_classes = shape
    rows = chunk_rows(n_rows, n_classes, 2, budget * n_classes * 2)
    assert 1 <= rows <= min(budget, n_rows)
    count = -(-n_rows // rows)
    # No more chunks than the budget makes necessary, but for multiples of 128.
    most = budget - budget % 128 if 128 <= budget < n_rows else budget
    assert count == -(-n_rows // min(most, n_rows))
    if count > 1 and budget >= 128:
        assert rows % 128 == 0
    assert ce_kernels.linear.MAX_LOGITS_BYTES < 0.6 * 2**30
    equal = chunk_rows(n_rows, n_classes, 2, budget * n_classes * 2, equal=True)
    assert 1 <= equal <= min(budget, n_rows)
    # No more rows in all, those done twice included, than as many chunks as are necessary would have.
    assert -(-n_rows // equal) * equal <= count * rows


@pytest.mark.parametrize("chunks", [4, 16, 32])
@pytest.mark.parametrize("frontend", [f for f in FRONTENDS if "interpreter" not in str(f.id)])
def test_errors_of_the_accumulations(frontend, chunks):
    """Against the fp64 sum of the same bf16 products, in units of the error of one rounding to bf16."""
    rng = np.random.default_rng(0)
    n_rows, width, n_classes = 2048, 32, 96
    hidden = rng.normal(size=(n_rows, width)).astype(NUMPY["bfloat16"])
    weight = (rng.normal(size=(n_classes, width)) * 0.3).astype(NUMPY["bfloat16"])
    labels = frontend.array(rng.integers(0, n_classes, n_rows))
    is_jax = frontend.api.__name__ == "jax_api"

    def found(accumulation, *more):
        def loss(weight):
            return (
                frontend.api.linear_cross_entropy(
                    frontend.array(hidden),
                    weight.T if is_jax else weight,
                    labels,
                    reduction="sum",
                    accumulation=accumulation,
                    max_logits_bytes=2 * n_classes * n_rows // chunks,
                    implementation=frontend.implementation,
                ),
            )

        return frontend.differentiate(loss, (np.ones(()),), weight)[1][0].astype(np.float64)

    def of_logits(logits):
        options = {"reduction": "sum", "implementation": frontend.implementation}
        return (frontend.api.cross_entropy(logits, labels, **options),)

    logits = (hidden.astype(np.float32) @ weight.astype(np.float32).T).astype(NUMPY["bfloat16"])
    dlogits = frontend.differentiate(of_logits, (np.ones(()),), logits)[1][0].astype(np.float64)
    exact = dlogits.T @ hidden.astype(np.float64)
    once = np.sqrt(np.mean((exact.astype(NUMPY["bfloat16"]).astype(np.float64) - exact) ** 2))
    errors = {name: np.sqrt(np.mean((found(name) - exact) ** 2)) / once for name in ("float32", "parameter")}
    assert errors["float32"] < 1.05
    # Errors of roundings that do not know of each other, of sums that grow with the chunks.
    assert 0.8 < errors["parameter"] / np.sqrt((chunks + 1) / 2) < 1.2
