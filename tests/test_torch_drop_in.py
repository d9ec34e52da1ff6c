"""What PyTorch documents of its own cross_entropy, and what users do around a loss."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import torch_api
from tests.conftest import HAS_GPU
from torch_api import cross_entropy

DEVICE = "cuda" if HAS_GPU else "cpu"
SHAPES = [
    ((5,), ()),
    ((4, 5), (4,)),
    ((4, 5, 3), (4, 3)),
    ((2, 5, 3, 2), (2, 3, 2)),
    ((0, 5), (0,)),
    ((2, 5, 0), (2, 0)),
]


@pytest.mark.parametrize(("shape", "rows"), SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_documented_call(shape, rows, kind, dtype):
    torch.manual_seed(0)
    logits = torch.randn(shape, dtype=dtype, requires_grad=True)
    target = torch.randint(0, 5, rows) if kind == "indices" else torch.randn(shape).to(dtype).softmax(0)
    half = dtype in (torch.float16, torch.bfloat16)
    precise = torch.float32 if half else dtype
    for reduction in ("none", "mean", "sum"):
        for weight in (None, torch.rand(5)):
            for options in ({}, {"label_smoothing": 0.2}, {"ignore_index": 2} if kind == "indices" else {}):
                leaf = logits.detach().to(precise).requires_grad_()
                w = None if weight is None else weight.to(precise)
                expected = F.cross_entropy(
                    leaf, target.to(precise) if kind == "probabilities" else target, w, reduction=reduction, **options
                )
                loss = cross_entropy(logits, target, w, reduction=reduction, **options)
                torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
                ours, theirs = torch.autograd.grad(loss.sum(), logits), torch.autograd.grad(expected.sum(), leaf)
                if theirs[0].isfinite().all():
                    torch.testing.assert_close(ours[0].to(precise), theirs[0], rtol=2e-2 if half else 1e-4, atol=1e-5)


@pytest.mark.parametrize("labels", [torch.int32, torch.int64, torch.uint8, torch.int16])
def test_label_dtypes(labels):
    logits, target = torch.randn(4, 5), torch.tensor([0, 4, 1, 2])
    torch.testing.assert_close(cross_entropy(logits, target.to(labels)), F.cross_entropy(logits, target))


def test_inference_mode_and_no_grad():
    logits, labels = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 4, -100, 2])
    expected = F.cross_entropy(logits, labels)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = cross_entropy(logits, labels)
            torch.testing.assert_close(loss, expected.detach())
            assert not loss.requires_grad
            for smoothing, weight in ((0.1, None), (0.0, torch.rand(5)), (0.3, torch.rand(5))):
                ours = cross_entropy(logits, labels, weight, label_smoothing=smoothing)
                torch.testing.assert_close(ours, F.cross_entropy(logits, labels, weight, label_smoothing=smoothing))
            torch.testing.assert_close(
                cross_entropy(logits, logits.softmax(1)), F.cross_entropy(logits, logits.softmax(1))
            )


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_checkpoint(reentrant, reduction):
    logits, labels = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 4, -100, 2])
    loss = lambda x: cross_entropy(x * 2, labels, reduction=reduction).sum()  # noqa: E731
    expected = torch.autograd.grad(loss(logits), logits)[0]
    checkpoint(loss, logits, use_reentrant=reentrant).backward()
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hooks_and_anomaly_mode(reduction):
    logits, labels = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 4, -100, 2])
    seen = []
    with torch.autograd.detect_anomaly(check_nan=True):
        inner = logits * 1
        inner.register_hook(lambda g: seen.append(g) or g * 2)
        loss = cross_entropy(inner, labels, reduction=reduction).sum()
        loss.grad_fn.register_hook(lambda *_: seen.append(None))
        loss.backward()
    assert len(seen) == 2
    expected = torch.autograd.grad(F.cross_entropy(logits, labels, reduction=reduction).sum(), logits)[0]
    torch.testing.assert_close(logits.grad, 2 * expected)


def test_losses_may_be_written_to():
    """Masking and weighting in place, as user code does with per-token losses."""
    for shape in ((4, 5), (4, 5, 2)):
        logits = torch.randn(shape, device=DEVICE, requires_grad=True)
        labels = torch.randint(0, 5, (4, *shape[2:]), device=DEVICE)
        scale = torch.tensor([1.0, 0.0, 3.0, 4.0], device=DEVICE).view(4, *(1 for _ in shape[2:]))
        for implementation in ("reference", "triton"):
            rows = cross_entropy(logits, labels, reduction="none", implementation=implementation)
            rows[1] = 0.0
            rows.mul_(scale)
            expected = F.cross_entropy(logits, labels, reduction="none") * scale
            torch.testing.assert_close(rows, expected)
            ours, theirs = (torch.autograd.grad(x.sum(), logits)[0] for x in (rows, expected))
            torch.testing.assert_close(ours, theirs)


def test_tensor_subclasses():
    class Tagged(torch.Tensor):
        pass

    plain, labels = torch.randn(4, 5), torch.tensor([0, 4, -100, 2])
    logits = plain.clone().as_subclass(Tagged).requires_grad_()
    loss = cross_entropy(logits, labels)
    assert type(loss) is Tagged
    loss.backward()
    leaf = plain.requires_grad_()
    torch.testing.assert_close(torch.Tensor(logits.grad), torch.autograd.grad(F.cross_entropy(leaf, labels), leaf)[0])
    rows = torch_api.cross_entropy_rows(logits, labels)
    assert type(rows.loss) is Tagged


def test_negated_views():
    """torch.imag of a conjugate leaves its sign to its readers."""
    logits = torch.view_as_complex(torch.randn(4, 5, 2, device=DEVICE)).conj().imag
    labels = torch.tensor([0, 4, 1, 2], device=DEVICE)
    assert logits.is_neg()
    for implementation in ("reference", "triton"):
        ours = cross_entropy(logits, labels, implementation=implementation)
        torch.testing.assert_close(ours, F.cross_entropy(logits, labels))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("n_rows", [1, 4])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_lazy_signs_and_zeros_of_what_comes_in(implementation, n_rows, reduction):
    """Gradients through complex numbers, and divisors, may be negated views; forward mode brings lazy zeros."""
    logits = torch.randn(n_rows, 5, device=DEVICE, requires_grad=True)
    labels = torch.tensor([0, 4, 1, 2], device=DEVICE)[:n_rows]

    def gradient(loss, **options):
        losses = loss(logits, labels, reduction=reduction, **options)
        z = torch.complex(torch.zeros_like(losses), losses).conj()
        return torch.autograd.grad(torch.view_as_real(z.resolve_conj())[..., 1].sum(), logits)[0]

    torch.testing.assert_close(gradient(cross_entropy, implementation=implementation), gradient(F.cross_entropy))
    negated = torch.view_as_complex(torch.tensor([1.0, -3.0], device=DEVICE)).conj().imag
    assert negated.is_neg()
    divided = cross_entropy(logits, labels, denominator=negated, implementation=implementation)
    torch.testing.assert_close(divided, F.cross_entropy(logits, labels, reduction="sum") / 3.0)
    loss = cross_entropy(logits, labels, reduction=reduction, implementation=implementation)
    assert not torch.autograd.grad(loss, logits, torch._efficientzerotensor(loss.shape, device=DEVICE))[0].any()


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_beside_ignored_rows_of_any_size(implementation, reduction):
    logits = torch.tensor([[1000.0, 0.0, 0.0], [1.0, 2.0, 3.0]], device=DEVICE, requires_grad=True)
    labels = torch.tensor([-100, 1], device=DEVICE)

    def second(loss, **options):
        value = loss(logits, labels, reduction=reduction, **options).sum()
        (gradient,) = torch.autograd.grad(value, logits, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), logits)[0]

    torch.testing.assert_close(second(cross_entropy, implementation=implementation), second(F.cross_entropy))


def test_labels_of_a_subclass_are_checked():
    class Mask(torch.Tensor):
        pass

    with pytest.raises(IndexError, match="got label 7"):
        cross_entropy(torch.randn(2, 5), torch.tensor([0, 7]).as_subclass(Mask))


def test_modes_that_watch_or_replace():
    logits, labels = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 4, -100, 2])
    expected = torch.autograd.grad(F.cross_entropy(logits, labels), logits)
    with FlopCounterMode(display=False):
        torch.testing.assert_close(torch.autograd.grad(cross_entropy(logits, labels), logits), expected)
    with torch.device("meta"):
        torch.testing.assert_close(torch.autograd.grad(cross_entropy(logits, labels), logits), expected)


def test_third_derivatives():
    logits, labels = torch.randn(4, 5, dtype=torch.double, requires_grad=True), torch.tensor([0, 4, -100, 2])

    def third(loss):
        value = loss(logits, labels)
        for _ in range(2):
            value = torch.autograd.grad(value, logits, create_graph=True)[0].square().sum()
        return torch.autograd.grad(value, logits)

    torch.testing.assert_close(third(cross_entropy), third(F.cross_entropy))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_logits_that_are_copied_for_reading_survive_two_backwards(implementation):
    logits, labels = torch.randn(2, 5, 3, device=DEVICE, requires_grad=True), torch.randint(0, 5, (2, 3), device=DEVICE)
    before = logits.detach().clone()
    loss = cross_entropy(logits, labels, implementation=implementation)
    expected = torch.autograd.grad(F.cross_entropy(logits, labels), logits)
    for keep in (True, True, False):
        torch.testing.assert_close(torch.autograd.grad(loss, logits, retain_graph=keep), expected)
    assert torch.equal(logits, before)


def test_parameters_as_logits_and_frozen_everything_else():
    parameter, labels = nn.Parameter(torch.randn(4, 5)), torch.tensor([0, 4, 1, 2])
    cross_entropy(parameter, labels).backward()
    assert parameter.grad is not None
    assert not cross_entropy(parameter.detach(), labels).requires_grad


def test_options_of_every_type_are_still_checked_after_a_good_call():
    """Checks are remembered by value: True and 1 are equal, and not the same."""
    logits, labels = torch.randn(4, 5), torch.tensor([0, 4, 1, 2])
    cross_entropy(logits, labels, label_smoothing=1.0, logit_scale=1)
    for wrong in (True, [1.0], torch.ones(())):
        with pytest.raises(TypeError, match="got label_smoothing of type"):
            cross_entropy(logits, labels, label_smoothing=wrong)
    with pytest.raises(TypeError, match="got class axis True"):
        cross_entropy(logits, labels, dim=True)


def test_data_parallel_threads():
    from concurrent.futures import ThreadPoolExecutor

    labels = torch.tensor([0, 4, -100, 2])

    def gradient(seed):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(4, 5, generator=generator).requires_grad_()
        return torch.autograd.grad(cross_entropy(logits, labels), logits)[0]

    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(gradient, range(20)))
    for seed, got in enumerate(threaded):
        assert torch.equal(got, gradient(seed))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"reduction": "sum"}], ids=str)
def test_the_default_dtype_changes_nothing(implementation, options):
    logits, labels = torch.randn(5, 7, device=DEVICE, requires_grad=True), torch.arange(5, device=DEVICE)

    def derivatives():
        loss = cross_entropy(logits, labels, implementation=implementation, **options)
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        return loss, gradient, torch.autograd.grad(gradient.square().sum(), logits)[0]

    expected = derivatives()
    torch.set_default_dtype(torch.float64)
    try:
        found = derivatives()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
