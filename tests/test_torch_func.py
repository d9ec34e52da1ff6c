"""torch.func, forward mode and derivatives of derivatives, on the plain operations and on the kernels."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from tests.cases import ALL
from tests.conftest import HAS_GPU
from torch_api import cross_entropy, cross_entropy_rows, launch

# PyTorch's own: forward mode loads decompositions that it deprecated, linearize inserts constants.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]

each_implementation = pytest.mark.parametrize("implementation", ["reference", "triton"])
each_reduction = pytest.mark.parametrize("reduction", ["mean", "none"])
DEVICE = "cuda" if HAS_GPU else "cpu"


@pytest.fixture
def batch(rng):
    """Two problems of 4 rows × 37 classes: logits, labels with ignored ones, soft targets, class weights."""
    labels = torch.from_numpy(rng.integers(0, 37, (2, 4)))
    labels[1, 2] = -100
    soft = torch.from_numpy(rng.normal(size=(2, 4, 37))).softmax(-1)
    arrays = torch.from_numpy(rng.normal(size=(2, 4, 37))), labels, soft, torch.from_numpy(rng.random((2, 37)) + 0.5)
    return [array.to(DEVICE) for array in arrays]


def plain_loss(x, y, w, reduction="mean"):
    """The contract with ALL options, written out once more in the plainest PyTorch."""
    x = ALL["softcap"] * torch.tanh(ALL["logit_scale"] * x / ALL["softcap"])
    hard = not y.is_floating_point()
    t = (y[..., None] == torch.arange(x.shape[-1], device=x.device)).to(x.dtype) if hard else y
    q = w * ((1 - ALL["label_smoothing"]) * t + ALL["label_smoothing"] / x.shape[-1])
    lse = x.logsumexp(-1)
    rows = (q * (lse[..., None] - x)).sum(-1) + ALL["z_loss"] * lse**2
    if not hard:
        return rows if reduction == "none" else rows.mean()
    rows = torch.where(y == -100, 0.0, rows)
    return rows if reduction == "none" else rows.sum() / torch.where(y == -100, 0.0, w[y.clamp(min=0)]).sum()


def ours(implementation, reduction="mean"):
    return lambda x, y, w: cross_entropy(x, y, w, reduction=reduction, implementation=implementation, **ALL)


def plain(reduction="mean"):
    return lambda x, y, w: plain_loss(x, y, w, reduction)


def total(function):
    return lambda *args: function(*args).sin().sum()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@each_implementation
@each_reduction
def test_grad_by_everything(batch, implementation, reduction):
    x, y, soft, w = (array[0] for array in batch)
    for target, argnums in ((y, (0, 2)), (soft, (0, 1, 2))):
        run = lambda f: grad(total(f), argnums)(x, target, w)  # noqa: B023, E731
        close(run(ours(implementation, reduction)), run(plain(reduction)))


@pytest.mark.parametrize(
    ("implementation", "in_dims"),
    [("reference", (None, 0, None)), ("reference", (None, None, 0)), ("reference", (1, 1, None))]
    + [(name, in_dims) for name in ("reference", "triton") for in_dims in ((0, 0, None), (0, None, None), (0, 0, 0))],
)
@each_reduction
def test_vmap_and_per_sample_gradients(batch, implementation, reduction, in_dims):
    x, y, soft, w = batch
    for target in (y, soft) if implementation == "reference" else (y,):
        arrays = [a if dim is not None else a[0] for a, dim in zip((x, target, w), in_dims, strict=True)]
        arrays = [a.movedim(0, 1) if dim == 1 else a for a, dim in zip(arrays, in_dims, strict=True)]
        for transform in (lambda f: f, lambda f: grad(total(f), (0, 2))):
            run = lambda f: vmap(transform(f), in_dims)(*arrays)  # noqa: B023, E731
            close(run(ours(implementation, reduction)), run(plain(reduction)))


@each_implementation
def test_nested_vmap(batch, implementation):
    x, y, _, w = batch
    run = lambda f: vmap(vmap(grad(f), (0, None, None)), (None, 0, None))(x, y, w[0])  # noqa: E731
    close(run(ours(implementation)), run(plain()))


@each_implementation
def test_vmap_over_nothing(batch, implementation):
    # Not `mean`: PyTorch itself cannot divide by a number under an empty vmap.
    x, y, _, w = batch
    rows = ours(implementation, "none")
    assert vmap(grad(total(rows)), (0, None, None))(x[:0], y[0], w[0]).shape == (0, 4, 37)
    assert vmap(rows, (None, None, 0))(x[0], y[0], w[:0]).shape == (0, 4)


def test_vmap_is_one_launch(one_row_a_program, batch, monkeypatch):
    x, y, _, w = batch
    launched = []
    run = launch._run
    monkeypatch.setattr(launch, "_run", lambda call, *rest: (launched.append(call), run(call, *rest)))
    vmap(grad(ours("triton")), (0, 0, None))(x, y, w[0])
    assert [(call.kernel, call.grid) for call in launched] == [
        ("cross_entropy_stats_kernel", (8, 1, 1)),
        ("cross_entropy_grad_kernel", (8, 1, 1)),
    ]


@each_implementation
@each_reduction
@pytest.mark.parametrize(
    "transform", [jacrev, jacfwd, hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(f))]
)
def test_jacobians_and_hessians(batch, implementation, reduction, transform):
    x, y, _, w = batch
    run = lambda f: transform(f)(x[1, 1:3, :9], y[1, 1:3].clamp(max=8), w[0, :9])  # noqa: E731
    close(run(ours(implementation, reduction)), run(plain(reduction)))


@each_implementation
@each_reduction
def test_forward_mode(batch, implementation, reduction):
    x, y, soft, w = batch
    run = lambda f: jvp(f, (x[0], soft[0], w[0]), (x[1], soft[1], w[1]))  # noqa: E731
    close(run(ours(implementation, reduction)), run(plain(reduction)))

    def linear(f):
        value, push = linearize(lambda x: f(x, y[0], w[0]), x[0])
        return value, push(x[1])

    close(linear(ours(implementation, reduction)), linear(plain(reduction)))

    def dual(f):
        with forward_ad.dual_level():
            return tuple(forward_ad.unpack_dual(f(forward_ad.make_dual(x[0], x[1]), y[0], w[0])))

    close(dual(ours(implementation, reduction)), dual(plain(reduction)))


@each_implementation
def test_hessian_vector_products_of_every_order_of_modes(batch, implementation):
    x, y, _, w = (array[0] for array in batch)

    def products(f):
        loss = lambda x: f(x, y, w)  # noqa: E731
        forward_over_reverse = jvp(grad(loss), (x,), (x.cos(),))[1]
        reverse_over_forward = grad(lambda x: jvp(loss, (x,), (x.detach().cos(),))[1])(x)
        reverse_over_reverse = vjp(grad(loss), x)[1](x.cos())[0]
        return forward_over_reverse, reverse_over_forward, reverse_over_reverse

    close(products(ours(implementation)), products(plain()))


@each_implementation
@each_reduction
def test_autograd_around_torch_func(batch, implementation, reduction):
    x, y, _, w = (array[0] for array in batch)

    def outer(f):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(grad(total(f))(leaf, y, w).sin().sum(), leaf)

    close(outer(ours(implementation, reduction)), outer(plain(reduction)))


@each_implementation
@each_reduction
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_autograd_functional(batch, implementation, reduction, strategy):
    x, y, _, w = batch
    x, y, w = x[1, 1:3, :9], y[1, 1:3].clamp(max=8), w[0, :9]

    def both(f):
        scalar = lambda x: total(f)(x, y, w)  # noqa: E731
        return (
            torch.autograd.functional.hessian(scalar, x, vectorize=True, outer_jacobian_strategy=strategy),
            torch.autograd.functional.jacobian(lambda x: f(x, y, w), x, vectorize=True, strategy=strategy),
        )

    close(both(ours(implementation, reduction)), both(plain(reduction)))


@each_implementation
def test_rows_transform_too(batch, implementation):
    x, y, _, w = batch
    rows = vmap(lambda x, y: cross_entropy_rows(x, y, w[0], implementation=implementation, **ALL))(x, y)
    assert torch.equal(rows.predicted, x.argmax(-1))
    close(rows.loss, vmap(lambda x, y: plain_loss(x, y, w[0], "none"))(x, y))
    through_lse = vmap(grad(lambda x, y: cross_entropy_rows(x, y, implementation=implementation).lse.sum()))
    close(through_lse(x, y), x.softmax(-1))


@each_implementation
def test_ignored_rows_may_hold_anything_in_every_mode(batch, implementation):
    x, y, _, w = (array[1] for array in batch)
    x = x.clone()
    x[2] = torch.nan
    loss = lambda x: ours(implementation)(x, y, w)  # noqa: E731
    for derivative in (grad(loss)(x), jvp(grad(loss), (x,), (torch.ones_like(x),))[1], jacfwd(loss)(x)):
        assert derivative.isfinite().all()


@each_implementation
def test_functional_call_and_per_sample_gradients_of_a_model(implementation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11)).to(DEVICE)
    tokens = torch.randint(0, 11, (5, 7), device=DEVICE)
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(parameters, tokens):
        logits = functional_call(model, parameters, tokens[:-1])
        return cross_entropy(logits, tokens[1:], implementation=implementation)

    per_sample = vmap(grad(loss), (None, 0))(parameters, tokens)
    for i, own in enumerate(tokens):
        expected = torch.autograd.grad(loss(dict(model.named_parameters()), own), model.parameters())
        for got, want in zip(per_sample.values(), expected, strict=True):
            torch.testing.assert_close(got[i], want, rtol=1e-5, atol=1e-7)


@each_implementation
def test_a_gradient_that_is_constant_has_derivatives(batch, implementation):
    """That of probabilities is, in them, where the logits are not differentiated."""
    x, t, w = batch[0][0], batch[2][0].requires_grad_(), batch[3][0]
    (gradient,) = torch.autograd.grad(ours(implementation)(x, t, w), t, create_graph=True)
    close(torch.autograd.grad((gradient * t).sum(), t)[0], gradient.detach())


@each_implementation
@each_reduction
@pytest.mark.parametrize("kind", [1, 2], ids=["hard", "soft"])
def test_jacobians_by_class_weights(batch, implementation, reduction, kind):
    x, y, w = batch[0][0], batch[kind][0], batch[3][0]
    expected = jacfwd(plain(reduction), 2)(x, y, w)
    close(jacrev(ours(implementation, reduction), 2)(x, y, w), expected)


@each_implementation
@each_reduction
def test_batched_gradients_that_cannot_be_right_say_what_to_write(batch, implementation, reduction):
    x, y, w = batch[0][0].requires_grad_(), batch[1][0], batch[3][0].requires_grad_()
    loss = ours(implementation, reduction)(x, y, w.detach())
    units = torch.eye(max(loss.numel(), 1), device=DEVICE, dtype=loss.dtype).view(-1, *loss.shape)
    with pytest.raises(RuntimeError, match=r"create_graph=True with is_grads_batched=True .*torch.func.jacrev"):
        torch.autograd.grad(loss, x, units, is_grads_batched=True, create_graph=True)
    loss = ours(implementation, reduction)(x, y, w)
    with pytest.raises(RuntimeError, match=r"by class weights.*torch.func.jacrev by the weights"):
        torch.autograd.grad(loss, w, units, is_grads_batched=True)


@each_reduction
def test_tangents_of_a_backward_whose_forward_had_none(batch, reduction):
    x, labels, _, _ = (array[1] for array in batch)
    x = x.requires_grad_()

    def second(loss):
        value = loss(x, labels, reduction=reduction)
        with forward_ad.dual_level():
            upstream = forward_ad.make_dual(torch.ones_like(value), torch.full_like(value, 2.0))
            return tuple(forward_ad.unpack_dual(torch.autograd.grad(value, x, upstream)[0]))

    torch.testing.assert_close(second(cross_entropy), second(torch.nn.functional.cross_entropy))


@each_implementation
def test_one_row_with_class_weights(batch, implementation):
    """Logits (C) and a 0-d label, as per-sample gradients have them."""
    x, labels, _, weight = (array[0] for array in batch)

    def loss(x, label):
        return cross_entropy(x, label, weight, implementation=implementation)

    def plainly(x, label):
        return torch.nn.functional.cross_entropy(x, label, weight)

    close(vmap(grad(loss))(x, labels), vmap(grad(plainly))(x, labels))
    value, tangent = linearize(lambda x: loss(x, labels[0]), x[0])
    close((value, tangent(x[1])), jvp(lambda x: plainly(x, labels[0]), (x[0],), (x[1],)))
    meta = (x[0].to("meta").requires_grad_(), labels[0].to("meta"), weight.to("meta"))
    assert cross_entropy(*meta, label_smoothing=0.1).device.type == "meta"
