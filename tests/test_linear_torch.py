"""What a PyTorch user does with linear_cross_entropy: freeze, checkpoint, autocast, compile, differentiate again."""

import pytest
import torch
import torch.nn.functional as F
from torch import library, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.conftest import HAS_GPU
from torch_api import (
    LinearCrossEntropyLoss,
    cross_entropy,
    cross_entropy_rows,
    linear_chunks,
    linear_cross_entropy,
    linear_cross_entropy_rows,
    linear_ops,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
DEVICE = "cuda" if HAS_GPU else "cpu"
OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0}


def problem(n_rows=7, width=5, n_classes=12, dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    arrays = [torch.randn(n_rows, width), torch.randn(n_classes, width), torch.randn(n_classes)][: 2 + bias]
    hidden, weight, *b = (x.to(DEVICE, dtype).requires_grad_() for x in arrays)
    labels = torch.randint(0, n_classes, (n_rows,), device=DEVICE)
    labels[1] = -100
    return hidden, weight, labels, b[0] if b else None


class Operations(TorchDispatchMode):
    """Matmuls and the largest tensor made, also inside of the chunk loops' operations."""

    def __init__(self):
        super().__init__()
        self.matmuls, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        if func.namespace == "ce_kernels_linear":
            with self:
                return getattr(linear_ops, f"_{name}")(*args)
        out = func(*args, **(kwargs or {}))
        self.matmuls += name in ("mm", "addmm", "addmm_")
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


@pytest.mark.parametrize(
    ("trained", "matmuls"), [((), 1), ((0,), 2), ((1,), 2), ((2,), 1), ((0, 1), 3), ((0, 1, 2), 3)], ids=str
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_parts_cost_no_matmul(reduction, trained, matmuls):
    hidden, weight, labels, bias = problem()
    arrays = [hidden, weight, bias]
    inputs = [x.detach().requires_grad_(i in trained) for i, x in enumerate(arrays)]
    with Operations() as ops:
        loss = linear_cross_entropy(inputs[0], inputs[1], labels, inputs[2], reduction=reduction)
        if trained:
            loss.sum().backward()
    assert ops.matmuls == matmuls + (reduction == "none" and len(trained) > 0)
    whole = cross_entropy(F.linear(*arrays), labels, reduction=reduction).sum()
    for i, expected in enumerate(torch.autograd.grad(whole, arrays)):
        if i in trained:
            torch.testing.assert_close(inputs[i].grad, expected)
        else:
            assert inputs[i].grad is None


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_never_more_than_a_chunk_of_logits(reduction):
    hidden, weight, labels, _ = problem(2048, 4, 512, torch.float32, bias=False)
    chunk = 128 * 512
    assert hidden.numel() < chunk
    with Operations() as ops:
        linear_cross_entropy(hidden, weight, labels, reduction=reduction, max_logits_bytes=4 * chunk).sum().backward()
    assert ops.largest == chunk
    with Operations() as ops:
        cross_entropy(F.linear(hidden, weight), labels, reduction=reduction).sum().backward()
    assert ops.largest > chunk


def test_second_backward_is_right():
    hidden, weight, labels, bias = problem()
    inputs = (hidden, weight, bias)
    loss = linear_cross_entropy(hidden, weight, labels, bias, max_logits_bytes=300)
    first = torch.autograd.grad(loss * 3, inputs, retain_graph=True)
    kept = [x.clone() for x in first]
    for x in first:
        x.zero_()
    for scale in (3, -1):
        again = torch.autograd.grad(loss * scale, inputs, retain_graph=True)
        for x, y in zip(again, kept, strict=True):
            torch.testing.assert_close(x, y * scale / 3)


def test_gradients_accumulate():
    hidden, weight, labels, bias = problem()
    for scale in (1.0, 2.0):
        (linear_cross_entropy(hidden, weight, labels, bias) * scale).backward()
    expected = torch.autograd.grad(cross_entropy(F.linear(hidden, weight, bias), labels) * 3, (hidden, weight, bias))
    for x, y in zip((hidden, weight, bias), expected, strict=True):
        torch.testing.assert_close(x.grad, y)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_derivatives_of_derivatives(reduction):
    hidden, weight, labels, bias = problem(5, 3, 4)

    def loss(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction, max_logits_bytes=64, **OPTIONS)

    def rows(hidden, weight):
        out = linear_cross_entropy_rows(hidden, weight, labels, bias.detach(), max_logits_bytes=64)
        return out.loss, out.lse

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))
    assert torch.autograd.gradgradcheck(loss, (hidden, weight, bias))
    assert torch.autograd.gradgradcheck(rows, (hidden, weight))
    assert torch.autograd.gradgradcheck(lambda hidden: loss(hidden, weight.detach(), bias.detach()), (hidden,))


def test_soft_labels_and_denominator_have_gradients():
    hidden, weight, _, bias = problem()
    soft = torch.rand(7, 12, dtype=torch.float64, device=DEVICE).requires_grad_()
    tokens = torch.tensor(3.0, dtype=torch.float64, device=DEVICE).requires_grad_()
    inputs = (hidden, weight, bias, soft, tokens)
    ours = linear_cross_entropy(hidden, weight, soft, bias, denominator=tokens, max_logits_bytes=300, **OPTIONS)
    whole = cross_entropy(F.linear(hidden, weight, bias), soft, denominator=tokens, **OPTIONS)
    for x, y in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(whole, inputs), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_checkpoint(reduction):
    hidden, weight, labels, bias = problem()

    def head(hidden):
        return linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction).sum()

    expected = torch.autograd.grad(head(hidden), (hidden, weight))
    for x, y in zip(
        torch.autograd.grad(checkpoint(head, hidden, use_reentrant=False), (hidden, weight)), expected, strict=True
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(reduction):
    hidden, weight, labels, bias = problem(dtype=torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction, max_logits_bytes=100)
        whole = cross_entropy(F.linear(hidden, weight, bias), labels, reduction=reduction)
    torch.testing.assert_close(ours, whole, rtol=1e-3, atol=1e-3)
    grads = [torch.autograd.grad(loss.sum(), (hidden, weight, bias)) for loss in (ours, whole)]
    for x, y in zip(*grads, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)
    # Sums of bf16 products in fp32, not rounded on the way.
    assert (grads[0][1].bfloat16() != grads[0][1]).any()


@pytest.fixture
def fresh_compiler():
    # Deterministic mode fills memory, which every compiled program would do too.
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_makes_one_graph(reduction):
    hidden, weight, labels, bias = problem(dtype=torch.float32)

    def step(hidden, weight, bias, labels):
        loss = linear_cross_entropy(hidden * 2, weight, labels, bias, reduction=reduction, **OPTIONS).sum()
        rows = linear_cross_entropy_rows(hidden * 2, weight, labels, bias)
        return loss.sin() + rows.lse.mean() + (rows.predicted == labels).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n_rows in (7, 5):
        inputs = (hidden.detach()[:n_rows].requires_grad_(), weight, bias)
        ours = compiled(*inputs, labels[:n_rows])
        expected = step(*inputs, labels[:n_rows])
        torch.testing.assert_close(ours, expected)
        for x, y in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(expected, inputs), strict=True):
            torch.testing.assert_close(x, y)
    if DEVICE == "cpu":
        with pytest.raises(IndexError, match="label 12 in labels"):
            compiled(hidden, weight, bias, labels.clamp(min=12))


@pytest.mark.parametrize("name", ["stats", "fused", "grad", "loss"])
def test_operators_pass_pytorch_s_own_checks(name):
    hidden, weight, labels, bias = problem(dtype=torch.float32)
    static = (-100, 0.1, 1e-3, None, 1.0, "reference", None, None, 100, "float32", torch.float32, None)
    row, one = torch.zeros(7, device=DEVICE), torch.ones((), device=DEVICE)
    arguments = {
        "stats": (*static, True),
        "fused": (one, *static, [True, True, False]),
        "loss": (one, *static, [True, True, False]),
        "grad": (row, row, row, None, *static, [True, False, True, False]),
    }[name]
    with torch.no_grad():
        arrays = [x.detach() for x in (hidden, weight, bias)]
        library.opcheck(
            getattr(torch.ops.ce_kernels_linear, name).default,
            (arrays[0], arrays[1], arrays[2], labels, None, *arguments),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_module_in_a_model():
    hidden, _, labels, _ = problem(dtype=torch.float32)
    head = nn.Linear(5, 12).to(DEVICE)
    weights = torch.rand(12, device=DEVICE)
    criterion = LinearCrossEntropyLoss(weights, label_smoothing=0.1, max_logits_bytes=200)
    assert repr(criterion) == "LinearCrossEntropyLoss(label_smoothing=0.1, max_logits_bytes=200)"
    assert "class_weight" in criterion.state_dict()
    ours = criterion(hidden[None], head.weight, labels[None], head.bias)
    whole = cross_entropy(head(hidden), labels, weights, label_smoothing=0.1)
    torch.testing.assert_close(ours, whole)
    rows = linear_cross_entropy_rows(hidden[None], head.weight, labels[None], head.bias)
    assert rows.loss.shape == rows.lse.shape == rows.predicted.shape == (1, 7)
    expected = cross_entropy_rows(head(hidden), labels)
    assert (rows.predicted[0] == expected.predicted).all()


TRANSFORMS = {
    "vmap": lambda f, *x: torch.func.vmap(f, (0, None, 0))(*x),
    "grad": lambda f, *x: torch.func.grad(f, (0, 1))(*x),
    "vmap of grad": lambda f, *x: torch.func.vmap(torch.func.grad(f, (0, 1)), (0, None, 0))(*x),
    "grad of vmap": lambda f, h, w, y: torch.func.grad(lambda *x: torch.func.vmap(f, (0, None, 0))(*x, y).sum())(h, w),
    "jvp": lambda f, h, w, y: torch.func.jvp(lambda h: f(h, w, y), (h,), (h,)),
    "hessian": lambda f, h, w, y: torch.func.hessian(f)(h[0], w, y[0]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_torch_func(reduction, name):
    hidden, weight, labels, bias = (x.detach() for x in problem())
    batch = torch.stack((hidden, hidden.flip(0))), weight, torch.stack((labels, labels.flip(0)))

    def loss(hidden, weight, labels):
        return linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction, max_logits_bytes=300).sum()

    def whole(hidden, weight, labels):
        return cross_entropy(F.linear(hidden, weight, bias), labels, dim=-1, reduction=reduction).sum()

    torch.testing.assert_close(TRANSFORMS[name](loss, *batch), TRANSFORMS[name](whole, *batch))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_batched_gradients(reduction):
    hidden, weight, labels, bias = problem()
    loss = linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction)
    upstream = torch.randn(3, *loss.shape, dtype=loss.dtype, device=DEVICE)
    batched = torch.autograd.grad(loss, (hidden, weight), upstream, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        one = torch.autograd.grad(loss, (hidden, weight), upstream[i], retain_graph=True)
        for x, y in zip(batched, one, strict=True):
            torch.testing.assert_close(x[i], y)


def test_meta_tensors():
    hidden, weight = torch.empty(3, 5, device="meta", requires_grad=True), torch.empty(4, 5, device="meta")
    loss = linear_cross_entropy(hidden, weight, torch.empty(3, dtype=torch.long, device="meta"))
    assert loss.device.type == "meta"


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_is_exported_can_be_trained(reduction, strict):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(5, 12, device=DEVICE, dtype=torch.float64)

        def forward(self, hidden, labels):
            rows = linear_cross_entropy(
                hidden, self.head.weight, labels, self.head.bias, reduction=reduction, max_logits_bytes=300, **OPTIONS
            )
            return rows.sum()

    model, (hidden, _, labels, _) = Model(), problem()
    exported = torch.export.export(model, (hidden.detach(), labels), strict=strict).module()
    # The head alone, as it was when the program was made, and what comes before it too.
    for before in ([], [hidden]):
        hidden.requires_grad_(bool(before))
        expected = torch.autograd.grad(model(hidden, labels), [*before, *model.parameters()])
        found = torch.autograd.grad(exported(hidden, labels), [*before, *exported.parameters()])
        torch.testing.assert_close(found, expected)
    with pytest.raises(RuntimeError, match="got create_graph=True in an exported or compiled graph"):
        torch.autograd.grad(exported(hidden, labels), hidden, create_graph=True)


@pytest.mark.parametrize(
    ("n_classes", "width", "rows"),
    [(151936, 2048, 151936), (128256, 4096, 64128), (262144, 2560, 65536), (151937, 4096, 50688)],
)
def test_only_a_large_sum_is_added_to_in_pieces(n_classes, width, rows):
    assert linear_chunks._classes_at_once(torch.empty(n_classes, width, device="meta")) == rows


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_writing_to_what_a_compiled_backward_reads_is_noticed(backend):
    hidden, weight, labels, bias = problem()

    def step(leaf):
        x = leaf * 1
        loss = linear_cross_entropy(x, weight, labels, bias, reduction="none", **OPTIONS)
        x[0] = 0.0
        return loss.sum()

    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.compile(step, backend=backend)(hidden).backward()


COMPILED_TRANSFORMS = {
    "second derivative": lambda f, h, w: torch.func.grad(lambda h: torch.func.grad(f)(h, w).square().sum())(h),
    "jacrev of grad": lambda f, h, w: torch.func.jacrev(torch.func.grad(f))(h, w),
    "vmap of grad": lambda f, h, w: torch.func.vmap(torch.func.grad(f, (0, 1)), (0, None))(torch.stack((h, 2 * h)), w),
    "heads": lambda f, h, w: torch.func.vmap(f, (None, 0))(h, torch.stack((w, 2 * w))),
}


@pytest.mark.parametrize("name", COMPILED_TRANSFORMS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_func_inside_compile(backend, name):
    hidden, weight, labels, bias = (x.detach() for x in problem())

    def run(hidden, weight):
        loss = lambda h, w: linear_cross_entropy(h, w, labels, bias, max_logits_bytes=300)  # noqa: E731
        return COMPILED_TRANSFORMS[name](loss, hidden, weight)

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(run, backend=backend, fullgraph=True)(hidden, weight), run(hidden, weight))


def test_a_penalty_of_the_gradient_inside_compile():
    hidden, weight, labels, _ = problem()

    def step(hidden, weight):
        loss = lambda h: linear_cross_entropy(h, weight, labels)  # noqa: E731
        return loss(hidden) + torch.func.grad(loss)(hidden).square().sum()

    torch._dynamo.reset()
    found, expected = (
        torch.autograd.grad(function(hidden, weight), (hidden, weight))
        for function in (torch.compile(step, backend="aot_eager", fullgraph=True), step)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_derivatives_of_compiled_gradients_raise(reduction):
    hidden, weight, labels, _ = problem()
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, backend="eager", fullgraph=True)
    loss = compiled(hidden, weight, labels, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="got create_graph=True in an exported or compiled graph"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    again = [torch.autograd.grad(loss, (hidden, weight), retain_graph=keep) for keep in (True, False)]
    torch.testing.assert_close(again[0], again[1], rtol=0, atol=0)


def test_vmap_over_nothing():
    hidden, weight, labels, _ = (x.detach() for x in problem())

    def loss(hidden, labels):
        return linear_cross_entropy(hidden, weight, labels)

    nothing = hidden[None][:0], labels[None][:0]
    assert torch.func.vmap(loss)(*nothing).shape == (0,)
    assert torch.func.vmap(torch.func.grad(loss))(*nothing).shape == (0, *hidden.shape)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_batched_gradients_are_not_detached_in_silence(reduction):
    hidden, weight, labels, bias = problem()
    loss = linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction)
    units = torch.eye(max(loss.numel(), 1), dtype=loss.dtype, device=DEVICE).view(-1, *loss.shape)
    with pytest.raises(RuntimeError, match=r"create_graph=True with is_grads_batched=True .*torch.func.jacrev"):
        torch.autograd.grad(loss, hidden, units, is_grads_batched=True, create_graph=True)
    torch.autograd.grad(loss, hidden, units, is_grads_batched=True)
