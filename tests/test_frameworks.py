"""The same cases against each framework's own losses, and the two front ends against each other on identical bits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import jax_api
import torch_api
from tests.cases import CASES, Case, make
from tests.frontends import FRONTENDS, Jax, Torch, each_frontend
from tests.test_contract import check_case

# What torch's own loss can express.
TORCH_OPTIONS = {"label_smoothing", "ignore_index"}
# The gradient of a masked class with target mass is 0 here, −q there.
SHARED_CASES = [case for case in CASES if not (case.labels == "soft" and case.logits == "masked")]
TORCH_CASES = [
    case
    for case in SHARED_CASES
    if set(case.options) <= TORCH_OPTIONS
    and case.options.get("ignore_index", 0) is not None
    and case.labels != "invalid"
    and case.n_rows
    and case.n_classes < 50000
]
# Plain Optax: integer labels without options.
OPTAX_CASES = [
    case
    for case in SHARED_CASES
    if not case.options and not case.weighted and case.labels in ("hard", "soft", "one_hot") and case.n_classes < 50000
]

REFERENCE = [p for p in FRONTENDS if isinstance(p.values[0], Torch)]


@pytest.mark.parametrize("case", TORCH_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("frontend", REFERENCE)
def test_torch_cross_entropy(frontend, case, reduction):
    arrays = make(case)
    options = {**case.options, "reduction": reduction}

    def run(function, cast, **extra):
        leaf = frontend.array(arrays.logits).to(cast).requires_grad_()
        target = frontend.array(arrays.target)
        weight = None if arrays.weight is None else frontend.array(arrays.weight)
        target = target.to(cast) if case.soft else target.long()
        loss = function(leaf, target, weight if weight is None else weight.to(cast), **options, **extra)
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        return loss, grad

    ours, dours = run(
        torch_api.cross_entropy, frontend.array(arrays.logits).dtype, implementation=frontend.implementation
    )
    theirs, dtheirs = run(F.cross_entropy, torch.float64)
    half = case.dtype in ("float16", "bfloat16")
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5, equal_nan=True)
    if case.labels != "all_ignored":
        torch.testing.assert_close(dours.double(), dtheirs, rtol=2e-2 if half else 2e-5, atol=1e-7)
    else:
        assert (dours == 0).all()


@pytest.mark.parametrize("case", OPTAX_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("frontend", [p for p in FRONTENDS if isinstance(p.values[0], Jax)])
def test_optax_losses(frontend, case):
    arrays = make(case)
    logits = jnp.asarray(arrays.logits)

    def ours(x):
        return jax_api.cross_entropy(x, arrays.target, reduction="none", implementation=frontend.implementation)

    def theirs(x):
        if case.soft:
            return optax.softmax_cross_entropy(x, jnp.asarray(arrays.target, jnp.float64))
        return optax.softmax_cross_entropy_with_integer_labels(x, arrays.target)

    np.testing.assert_allclose(ours(logits), theirs(logits.astype(jnp.float64)), rtol=1e-5, atol=1e-5)
    dours = jax.grad(lambda x: ours(x).sum())(logits)
    dtheirs = jax.grad(lambda x: theirs(x).sum())(logits.astype(jnp.float64))
    rtol = 2e-2 if case.dtype in ("float16", "bfloat16") else 2e-5
    np.testing.assert_allclose(np.asarray(dours, np.float64), dtheirs, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.labels != "invalid" and c.n_classes < 50000], ids=lambda c: c.name
)
@pytest.mark.parametrize("name", ["interpreter", "gpu"])
def test_both_front_ends_on_identical_bits(case, name):
    """The same kernels on the same bits: per-row losses and gradients are equal to the last bit."""
    pair = [p for p in FRONTENDS if p.id.endswith(name)]
    for mark in pair[0].marks:
        if mark.name == "skip" or not torch.cuda.is_available():
            pytest.skip("needs a GPU" if mark.name == "gpu" else mark.kwargs["reason"])
    arrays = make(case)
    g = np.linspace(-1, 1, case.n_rows)
    results = []
    for param in pair:
        frontend = param.values[0]
        target = frontend.array(arrays.target)
        weight = None if arrays.weight is None else frontend.array(arrays.weight)

        def loss(x, frontend=frontend, target=target, weight=weight):
            options = {**case.options, "reduction": "none", "implementation": frontend.implementation}
            return (frontend.api.cross_entropy(x, target, weight, **options),)

        (value,), (dlogits,) = frontend.differentiate(loss, (g,), arrays.logits)
        results.append((value, np.asarray(dlogits, np.float64)))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    # XLA's threads flush subnormals.
    flushed = [np.where(np.abs(dlogits) < 2.0**-126, 0.0, dlogits) for _, dlogits in results]
    np.testing.assert_array_equal(*flushed)


@st.composite
def cases(draw):
    labels = draw(st.sampled_from(["hard", "ignored", "soft"]))
    options = {
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "z_loss": draw(st.sampled_from([0.0, 1e-3])),
        "softcap": draw(st.sampled_from([None, 5.0, 30.0])),
        "logit_scale": draw(st.sampled_from([1.0, 0.5, -2.0])),
    }
    return Case(
        f"hypothesis_{draw(st.integers(0, 2**16))}",
        draw(st.integers(1, 9)),
        draw(st.integers(1, 700)),
        draw(st.sampled_from(["float16", "bfloat16", "float32", "float64"])),
        draw(st.sampled_from([0.1, 1.0, 20.0])),
        labels,
        # Smoothing puts mass on masked classes, whose loss is then +inf.
        draw(st.sampled_from(["normal", "masked"]))
        if labels == "ignored" and not options["label_smoothing"]
        else "normal",
        draw(st.booleans()),
        draw(st.sampled_from(["int32", "int64"])),
        options,
    )


@given(case=cases(), reduction=st.sampled_from(["none", "mean", "sum"]))
@each_frontend
def test_any_shape_and_options(frontend, case, reduction):
    check_case(frontend, case, reduction)
