"""Every case of the table, in every front end and implementation, against the float64 oracle."""

import ml_dtypes
import numpy as np
import pytest
import torch

import torch_api
from tests import oracle
from tests.cases import (
    CASES,
    LONG_CASES,
    NUMPY,
    ROUNDOFF,
    SMALLEST,
    Arrays,
    Case,
    error_constant,
    make,
    oracle_options,
)
from tests.conftest import HAS_GPU
from tests.frontends import Jax, each_frontend, each_kernel, each_torch_kernel

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def check_case(
    frontend, case: Case, reduction: str, denominator: float | None = None, *, with_dtarget: bool = True
) -> None:
    """Loss, dlogits, dtarget and dweight of one case and reduction within what the arithmetic can produce.

    Soft targets without a gradient, as those of a teacher, are trained in one launch.
    """
    arrays = make(case)
    options = oracle_options(case, arrays.weight)
    rng = np.random.default_rng(0)
    rows = oracle.rows(arrays.logits, arrays.target, options)
    expected = oracle.reduce(rows, arrays.target, options, reduction, denominator)
    # A random upstream gradient a row, with a zero; a scalar for the reductions, 1 as in training.
    each = (
        np.ones(case.n_rows) if reduction == "none" else oracle.upstream(arrays.target, options, reduction, denominator)
    )
    g = rng.normal(size=case.n_rows) * (np.arange(case.n_rows) != 3) if reduction == "none" else np.ones(())
    with_dtarget &= case.soft
    (value,), grads = differentiate(frontend, case, arrays, reduction, denominator, g, with_dtarget)
    compute = "float64" if case.dtype == "float64" else "float32"
    assert value.dtype == compute
    assert value.shape == np.shape(expected)
    bound = loss_bound(arrays, options, rows, compute)
    with np.errstate(invalid="ignore"):
        assert_close(value, expected, bound if reduction == "none" else np.sum(np.where(each == 0, 0, each * bound)))

    dloss = g * each
    check_gradients(frontend, case, arrays, options, dloss, None, grads, compute, with_dtarget=with_dtarget)
    if arrays.weight is not None and denominator is None and np.isfinite(each).all():
        if reduction == "mean" and not case.soft:
            dweight = oracle.mean_dweight(arrays.logits, arrays.target, options)
        else:
            dweight = oracle.gradients(
                arrays.logits, arrays.target, options, dloss, None, unit_roundoff_out=0, unit_roundoff=0, c=0
            ).dweight
        assert_close(
            grads[-1],
            dweight,
            64 * ROUNDOFF["float32"] * (1 + np.max(np.abs(dweight), initial=0, where=np.isfinite(dweight))),
        )


def differentiate(frontend, case, arrays: Arrays, reduction, denominator, g, with_dtarget):
    """The loss and its gradients by logits, soft targets and weights."""
    inputs = [arrays.logits]
    inputs += [arrays.target] if with_dtarget else []
    inputs += [] if arrays.weight is None else [arrays.weight]
    fixed = None if with_dtarget else frontend.array(arrays.target)
    # Out of range labels raise on the CPU in torch, which is tested elsewhere; under autograd they are NaN.
    options = {**case.options, "reduction": reduction, "denominator": getattr(denominator, "array", denominator)}

    def function(logits, *rest):
        rest = list(rest)
        target = rest.pop(0) if with_dtarget else fixed
        weight = rest.pop(0) if rest else None
        return (frontend.api.cross_entropy(logits, target, weight, implementation=frontend.implementation, **options),)

    return frontend.differentiate(function, (g,), *inputs)


def loss_bound(arrays, options, rows, compute) -> np.ndarray:
    """What rounding may add to each row's loss: of x and lse, as large as the logits, and of the loss itself."""
    c = error_constant(arrays.logits, options)
    of_z = options.z_loss * (16 * rows.lse**2 + 2 * c * np.abs(rows.lse))
    return ROUNDOFF[compute] * (c * (np.abs(rows.target_sum) + np.abs(rows.loss)) + of_z)


def check_gradients(frontend, case, arrays, options, dloss, dlse, grads, compute, *, with_dtarget=True) -> None:
    # The interpreter truncates to bf16 where hardware rounds: twice the error.
    truncates = frontend.implementation == "triton" and not HAS_GPU and case.dtype == "bfloat16"
    out = ROUNDOFF[case.dtype] * (2 if truncates else 1)
    c = error_constant(arrays.logits, options)
    expected = oracle.gradients(
        arrays.logits,
        arrays.target,
        options,
        dloss,
        dlse,
        unit_roundoff_out=out,
        unit_roundoff=ROUNDOFF[compute],
        c=c,
    )
    assert grads[0].dtype == arrays.logits.dtype
    # Below the smallest normal number everything may round to 0.
    floor = SMALLEST[case.dtype] * (1 + np.abs(dloss).max(initial=0))
    assert_close(grads[0], expected.dlogits, expected.dlogits_bound + floor)
    if case.soft and with_dtarget:
        assert grads[1].dtype == arrays.target.dtype
        bound = out * np.abs(expected.dtarget) + 4 * c * ROUNDOFF[compute] * np.abs(dloss)[:, None]
        assert_close(grads[1], expected.dtarget, bound)


def assert_close(actual, expected, bound) -> None:
    """|actual − expected| ≤ bound element by element; NaN and infinities must agree."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        wrong = ~(same | (np.abs(actual - expected) <= bound))
    if wrong.any():
        bound = np.broadcast_to(bound, expected.shape)
        where = np.argwhere(wrong)[0]
        at = tuple(where)
        raise AssertionError(
            f"{wrong.sum()} of {wrong.size} beyond the bound, first at {at}: "
            f"{actual[at]} for {expected[at]}, bound {bound[at]}"
        )


@each_case
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@each_frontend
def test_loss_and_gradients(frontend, reduction, case):
    if case.labels == "invalid" and frontend.device == "cpu" and frontend.api.__name__ == "torch_api":
        with pytest.raises(IndexError, match=r"got label -1 in target; required: labels in \[0, 40\)"):
            check_case(frontend, case, reduction)
        return
    check_case(frontend, case, reduction)


@each_torch_kernel
@pytest.mark.parametrize("case", LONG_CASES, ids=lambda case: case.name)
def test_rows_spread_over_clusters(clusters, case, frontend):
    """What a GPU with clusters runs on long rows."""
    for reduction in ("mean", "none"):
        check_case(frontend, case, reduction, with_dtarget=False)


@each_kernel
@pytest.mark.parametrize("case", LONG_CASES, ids=lambda case: case.name)
def test_rows_that_programs_share(shared_rows, case, frontend):
    """What a GPU of many multiprocessors runs on many long rows; JAX writes the gradient over the logits."""
    check_case(frontend, case, "mean", with_dtarget=False)


@each_kernel
@pytest.mark.parametrize("shared_rows", [3], indirect=True)
@pytest.mark.parametrize("name", ["long_masked_low", "long_shifted", "long_weight_smoothing", "long_soft_shifted"])
def test_any_number_of_programs_shares_a_row(shared_rows, name, frontend):
    """Three or six of them."""
    (case,) = (case for case in LONG_CASES if case.name == name)
    check_case(frontend, case, "mean", with_dtarget=False)


def test_invalid_labels_of_rows_that_programs_share(shared_rows):
    """NaN in their own rows: in JAX, as PyTorch raises on CPUs."""
    case = Case("long_invalid", 6, 1023, "bfloat16", labels="invalid")
    check_case(Jax("triton", "cuda" if HAS_GPU else "cpu"), case, "mean")


def check_rows_of_a_wider_buffer():
    """Rows that start between 16-byte boundaries of logits, and otherwise in their gradient: in PyTorch."""
    rng = np.random.default_rng(0)
    buffer = torch.tensor(rng.normal(size=(9, 1029)), dtype=torch.bfloat16, device="cuda" if HAS_GPU else "cpu")
    labels = torch.tensor(rng.integers(0, 1023, 9), device=buffer.device)

    def step(implementation):
        logits = buffer.detach()[:, :1023].requires_grad_()
        loss = torch_api.cross_entropy(logits, labels, implementation=implementation)
        return loss, torch.autograd.grad(loss, logits)[0]

    torch.testing.assert_close(step("triton"), step("reference"), rtol=2.0**-7, atol=1e-6)


def test_programs_share_rows_of_a_wider_buffer(shared_rows):
    check_rows_of_a_wider_buffer()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@each_frontend
def test_enormous_logits_have_finite_gradients(frontend, reduction, dtype):
    """Also those whose product with log₂e rounds by more than an exponent holds, and a row of the lowest number."""
    lowest = float(ml_dtypes.finfo(NUMPY[dtype]).min)
    logits = np.zeros((6, 8), NUMPY[dtype])
    logits[:5, 0] = (1e4, 3e9, 1e10, 1e30, -0.9 * lowest)
    logits[5] = lowest
    arrays = Arrays(logits, np.zeros(6, np.int64), None)
    g = np.ones(6) if reduction == "none" else np.ones(())
    (loss,), (gradient,) = differentiate(frontend, Case("enormous", 6, 8, dtype), arrays, reduction, None, g, False)
    np.testing.assert_allclose(np.sum(np.asarray(loss, np.float64)), np.log(8), rtol=1e-6)
    gradient = np.asarray(gradient, np.float64)
    np.testing.assert_allclose(gradient[:5], 0.0, atol=2.0**-23)
    assert np.isfinite(gradient).all()
