"""cross_entropy_rows, denominators, shapes, modules, second derivatives, and slices of the vocabulary."""

import copy
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jax.test_util import check_grads

import ce_kernels
import jax_api
import torch_api
from ce_kernels import interpreter, plan_grad, plan_stats
from tests import oracle
from tests.cases import ALL, CASES, make, oracle_options
from tests.conftest import HAS_GPU
from tests.frontends import each_frontend
from tests.test_contract import assert_close, check_case, check_gradients, loss_bound

ROW_CASES = [c for c in CASES if c.labels != "invalid"]


@pytest.mark.parametrize(
    ("case", "through"),
    [
        pytest.param(case, through, id=f"{through}-{case.name}")
        for case in ROW_CASES
        for through in (("both", "loss", "lse") if case.n_classes < 50000 else ("both",))
    ],
)
@each_frontend
def test_rows(frontend, through, case):
    arrays = make(case)
    options = oracle_options(case, arrays.weight)
    expected = oracle.rows(arrays.logits, arrays.target, options)
    rng = np.random.default_rng(1)
    dloss, dlse = rng.normal(size=(2, case.n_rows))
    dloss, dlse = (dloss if through != "lse" else 0 * dloss), (dlse if through != "loss" else 0 * dlse)
    weight = None if arrays.weight is None else frontend.array(arrays.weight)
    labels = None if case.soft else frontend.array(arrays.target)

    def function(logits, *soft):
        target = soft[0] if soft else labels
        return frontend.api.cross_entropy_rows(
            logits, target, weight, implementation=frontend.implementation, **case.options
        )

    upstream = (dloss if through != "lse" else None, dlse if through != "loss" else None, None)
    inputs = [arrays.logits, arrays.target] if case.soft else [arrays.logits]
    (loss, lse, predicted), grads = frontend.differentiate(function, upstream, *inputs)
    compute = "float64" if case.dtype == "float64" else "float32"
    assert_close(loss, expected.loss, loss_bound(arrays, options, expected, compute))
    assert_close(lse, expected.lse, loss_bound(arrays, oracle.Options(logit_scale=options.logit_scale,
        softcap=options.softcap), oracle.Rows(0, 0, 1.0, 0), compute))  # fmt: skip
    if case.n_rows:
        # Rounding may make ties: the class predicted is one of the largest.
        raw = arrays.logits.astype(np.float64)
        masked = np.isneginf(raw)
        largest = np.where(masked, -np.inf, np.where(masked, 0.0, raw) * options.logit_scale)
        chosen = np.take_along_axis(largest, predicted[:, None].astype(int), 1)[:, 0]
        assert_close(chosen, largest.max(1), 1e-6 * np.abs(largest.max(1)))
    if case.soft and through == "lse":
        grads[1] = np.zeros_like(arrays.target) if grads[1] is None else grads[1]
    check_gradients(frontend, case, arrays, options, dloss, dlse, grads, compute)


@each_frontend
def test_predicted_takes_the_lowest_of_equals(frontend):
    logits = np.zeros((3, 700), np.float32)
    logits[1, [300, 600]] = 1.0
    logits[2, 699] = 1.0
    rows = frontend.api.cross_entropy_rows(
        frontend.array(logits), frontend.array(np.array([0, -100, 2])), implementation=frontend.implementation
    )
    assert frontend.numpy(rows.predicted).tolist() == [0, 300, 699]


@pytest.mark.parametrize(
    "place",
    {
        "as_the_logits": lambda t: t,
        "between_boundaries": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view_as(t),
        "rows_further_apart": lambda t: torch.cat([t, t[:, :3]], 1)[:, : t.shape[1]],
        "float32": lambda t: t.float(),
        "float64": lambda t: t.double(),
    }.items(),
    ids=lambda place: place[0],
)
@pytest.mark.parametrize("n_classes", [1101, 1104])
def test_soft_targets_lie_anywhere(place, n_classes):
    """Rows of logits between 16-byte boundaries, and of soft targets there or elsewhere."""
    device = "cuda" if HAS_GPU else "cpu"
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(2, 5, n_classes, generator=generator).bfloat16().to(device)
    target = place[1](target.float().softmax(-1).bfloat16())
    leaf = logits.requires_grad_()
    for reduction in ("none", "mean"):
        found = torch_api.cross_entropy(leaf, target, reduction=reduction, implementation="triton")
        right = F.cross_entropy(leaf.double(), target.double(), reduction=reduction)
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)
        (gradient,), (expected,) = (torch.autograd.grad(loss.sum(), leaf) for loss in (found, right))
        torch.testing.assert_close(gradient, expected, rtol=2.0**-7, atol=1e-7)


@each_frontend
@pytest.mark.parametrize("kind", ["number", "array", "integer_array"])
def test_denominator(frontend, kind):
    case = next(c for c in CASES if c.name == "all_options")
    value = {"number": 7.0, "array": frontend.array(np.float32(7.0)), "integer_array": frontend.array(np.int32(7))}[
        kind
    ]
    check_case(frontend, case, "mean", value if kind == "number" else _Number(value))
    everything_ignored = next(c for c in CASES if c.name == "all_ignored")
    arrays = make(everything_ignored)
    loss = frontend.api.cross_entropy(
        frontend.array(arrays.logits), frontend.array(arrays.target), denominator=value,
        implementation=frontend.implementation,
    )  # fmt: skip
    assert float(loss) == 0.0


@each_frontend
def test_rows_without_upstream_gradient_may_hold_anything(frontend):
    logits = np.array([[-np.inf] * 3, [1.0, np.nan, 3.0], [1.0, 2.0, 3.0]], np.float32)
    labels = frontend.array(np.array([0, 1, 2]))

    def loss(x):
        options = {"denominator": float("inf"), "implementation": frontend.implementation}
        return (frontend.api.cross_entropy(x, labels, **options),)

    _, (gradient,) = frontend.differentiate(loss, (np.float32(1.0),), logits)
    assert not gradient.any()


class _Number(float):
    """7.0 to the oracle, an array to the front end."""

    def __new__(cls, array):
        self = super().__new__(cls, 7.0)
        self.array = array
        return self


@each_frontend
def test_gradient_accumulation_with_a_global_denominator(frontend, rng):
    logits, labels = rng.normal(size=(8, 30)), rng.integers(0, 30, 8)
    labels[:3] = -100

    def grad(rows, **options):
        def loss(x):
            target = frontend.array(labels[rows])
            return (frontend.api.cross_entropy(x, target, implementation=frontend.implementation, **options),)

        return frontend.differentiate(loss, (np.ones(()),), logits[rows])[1][0]

    halves = [grad(slice(0, 4), denominator=5.0), grad(slice(4, 8), denominator=5.0)]
    np.testing.assert_allclose(np.concatenate(halves), grad(slice(0, 8)), rtol=1e-12)


@each_frontend
def test_class_axis(frontend, rng):
    logits = rng.normal(size=(2, 11, 3, 4))
    labels, soft = rng.integers(0, 11, (2, 3, 4)), rng.random((2, 11, 3, 4))
    keyword = "dim" if frontend.api is torch_api else "axis"
    for target in (labels, soft):
        expected = F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(target), reduction="none")
        for axis in (1, -3, -1):
            moved = logits if axis != -1 else np.moveaxis(logits, 1, -1)
            moved_target = target if axis != -1 or target is labels else np.moveaxis(target, 1, -1)
            loss = frontend.api.cross_entropy(
                frontend.array(moved), frontend.array(moved_target), reduction="none",
                implementation=frontend.implementation, **{keyword: axis},
            )  # fmt: skip
            np.testing.assert_allclose(frontend.numpy(loss), expected, rtol=1e-12)


@each_frontend
def test_a_single_row(frontend):
    logits = np.array([1.0, 2.0, 3.0])
    for target in (np.array(2), np.array([0.2, 0.3, 0.5])):
        for reduction in ("none", "mean", "sum"):
            loss = frontend.api.cross_entropy(
                frontend.array(logits), frontend.array(target), reduction=reduction,
                implementation=frontend.implementation,
            )  # fmt: skip
            expected = F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(target), reduction=reduction)
            assert tuple(loss.shape) == ()
            np.testing.assert_allclose(frontend.numpy(loss), expected)


@each_frontend
def test_no_rows_mean_is_nan(frontend):
    loss = frontend.api.cross_entropy(
        frontend.array(np.zeros((0, 5), np.float32)), frontend.array(np.zeros(0, np.int64)),
        implementation=frontend.implementation,
    )  # fmt: skip
    assert np.isnan(frontend.numpy(loss))


def test_module_is_torchs_module():
    weight = torch.rand(5)
    ours, theirs = torch_api.CrossEntropyLoss(weight), torch.nn.CrossEntropyLoss(weight)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    assert repr(torch_api.CrossEntropyLoss()) == repr(torch.nn.CrossEntropyLoss())
    assert repr(torch_api.CrossEntropyLoss(softcap=30.0, reduction="sum")) == (
        "CrossEntropyLoss(reduction='sum', softcap=30.0)"
    )
    logits, labels = torch.randn(4, 5), torch.tensor([0, 4, -100, 2])
    torch.testing.assert_close(ours(logits, labels), theirs(logits, labels))
    torch.testing.assert_close(
        copy.deepcopy(ours).double()(logits.double(), labels), theirs.double()(logits.double(), labels)
    )
    plain = torch_api.CrossEntropyLoss()
    torch.testing.assert_close(
        plain(logits, labels, denominator=torch.tensor(6)), F.cross_entropy(logits, labels, reduction="sum") / 6
    )


IMPLEMENTATIONS = ["reference", "triton"]
SMOOTH = {**ALL, "softcap": 3.0}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("soft", [False, True])
def test_gradcheck(implementation, reduction, soft):
    device = "cuda" if HAS_GPU and implementation == "triton" else "cpu"
    torch.manual_seed(0)
    logits = torch.randn(3, 5, dtype=torch.double, device=device, requires_grad=True)
    weight = torch.rand(5, dtype=torch.double, device=device, requires_grad=True)
    target = torch.tensor([1, -100, 4], device=device)
    if soft:
        target = torch.rand(3, 5, dtype=torch.double, device=device, requires_grad=True)
    options = {**SMOOTH, "reduction": reduction, "implementation": implementation}

    def loss(logits, weight, *soft):
        return torch_api.cross_entropy(logits, soft[0] if soft else target, weight, **options)

    def fused(logits):
        return torch_api.cross_entropy(logits, target.detach(), weight.detach(), **options)

    def rows(logits, weight, *soft):
        chosen = soft[0] if soft else target
        return torch_api.cross_entropy_rows(logits, chosen, weight, **SMOOTH, implementation=implementation)[:2]

    inputs = (logits, weight, target) if soft else (logits, weight)
    for function, args in ((loss, inputs), (fused, (logits,)), (rows, inputs)):
        # One random projection instead of every element: the interpreter takes its time.
        assert torch.autograd.gradcheck(function, args, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, args, fast_mode=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("soft", [False, True])
def test_check_grads(implementation, soft, rng):
    logits, weight = jnp.asarray(rng.normal(size=(3, 5))), jnp.asarray(rng.random(5))
    labels, target = jnp.array([1, -100, 4]), jnp.asarray(rng.random((3, 5)))

    def losses(logits, weight, target):
        target = target if soft else labels
        options = {**SMOOTH, "implementation": implementation}
        rows = jax_api.cross_entropy_rows(logits, target, weight, **options)
        reduced = [
            jax_api.cross_entropy(logits, target, weight, reduction=r, **options) for r in ("none", "mean", "sum")
        ]
        return rows[:2], reduced

    check_grads(losses, (logits, weight, target), order=2, modes=["rev"])


@pytest.mark.skipif(HAS_GPU, reason="drives the interpreter directly")
@pytest.mark.parametrize("name", ["classes_1000", "all_options", "invalid_labels", "smoothing"])
def test_slices_of_the_vocabulary_merge(name):
    """Each slice knows its start; lse and loss merge by the formula in the kernels' docstring; gradients are local."""
    case = next(c for c in CASES if c.name == name)
    arrays = make(case)
    whole = oracle_options(case, arrays.weight)
    options = ce_kernels.Options(**case.options)
    expected = oracle.rows(arrays.logits, arrays.target, whole)
    # z-loss belongs to the merged lse.
    local = ce_kernels.Options(**{**case.options, "z_loss": 0.0})
    bounds = (0, 3, case.n_classes // 2, case.n_classes)
    slices = [slice(a, b) for a, b in pairwise(bounds)]
    stats = [_slice_statistics(arrays, part, local) for part in slices]
    loss, lse, s = (np.stack([out[key] for out in stats]) for key in ("loss_ptr", "lse_ptr", "target_sum_ptr"))
    merged_lse = np.logaddexp.reduce(lse, axis=0)
    merged = (loss + s * (merged_lse - lse)).sum(0) + options.z_loss * merged_lse**2 * (s.sum(0) != 0)
    assert_close(merged, expected.loss, 1e-5 * (1 + np.abs(expected.loss)))
    dloss = np.linspace(0.5, 1.5, case.n_rows).astype(np.float32)
    grads = [_slice_gradient(arrays, part, options, merged_lse, s.sum(0), dloss) for part in slices]
    gradient = oracle.gradients(
        arrays.logits, arrays.target, whole, dloss, None, unit_roundoff_out=2**-24, unit_roundoff=2**-24, c=64
    )
    assert_close(np.concatenate(grads, 1), gradient.dlogits, gradient.dlogits_bound)


def _slice_arguments(arrays, part, options):
    logits = np.ascontiguousarray(arrays.logits[:, part])
    weight = None if arrays.weight is None else np.ascontiguousarray(arrays.weight[part])
    problem = ce_kernels.Problem(
        n_rows=len(logits), n_classes=logits.shape[1], logits_dtype="float32", soft_targets=False,
        logits_stride=logits.shape[1], target_stride=1, total_classes=arrays.logits.shape[1],
    )  # fmt: skip
    inputs = {"logits_ptr": logits, "target_ptr": arrays.target, "weight_ptr": weight}
    return problem, {**inputs, "vocab_start_ptr": np.array(part.start), **options.scalars()}


def _slice_statistics(arrays, part, options):
    problem, arguments = _slice_arguments(arrays, part, options)
    launch = plan_stats(problem, with_argmax=False)
    out = {output.name: np.empty(output.shape, output.dtype) for output in launch.outputs}
    interpreter.run(launch, arguments | out)
    return out


def _slice_gradient(arrays, part, options, lse, target_sum, dloss):
    problem, arguments = _slice_arguments(arrays, part, options)
    launch = plan_grad(problem, dloss_stride=1, dlse_stride=0, dtarget_dtype=None, in_place=False)
    out = {"dlogits_ptr": np.empty((problem.n_rows, problem.n_classes), np.float32)}
    rows = {"lse_ptr": lse.astype(np.float32), "target_sum_ptr": target_sum.astype(np.float32), "dloss_ptr": dloss}
    interpreter.run(launch, arguments | rows | out)
    return out["dlogits_ptr"]


def test_sum_of_weights_of_zero_is_nan_like_torch():
    logits, weight = torch.randn(2, 3), torch.tensor([0.0, 1.0, 1.0])
    labels = torch.tensor([0, 0])
    assert torch_api.cross_entropy(logits, labels, weight).isnan()
    assert jnp.isnan(
        jax_api.cross_entropy(jnp.asarray(logits.numpy()), jnp.asarray(labels.numpy()), jnp.asarray(weight.numpy()))
    )
    assert jax.jit(jax_api.cross_entropy)(jnp.zeros((0, 3)), jnp.zeros(0, int)).dtype == jnp.float64
