"""torch.compile, torch.export, make_fx: one graph, few recompilations, operators that PyTorch's own checks accept."""

import pytest
import torch
import torch.nn.functional as F
from torch import library
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

from ce_kernels import Options
from tests.conftest import HAS_GPU
from torch_api import CrossEntropyLoss, cross_entropy, cross_entropy_rows, ops, patch, reductions
from torch_api.rows import RowSpec

# Of Inductor's own start, and of the device that it looks for.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),
]
DEVICE = "cuda" if HAS_GPU else "cpu"
OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0}


@pytest.fixture(autouse=True)
def fresh_caches():
    # Deterministic mode fills memory, which every compiled program would do too.
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def problem(n_rows=6, n_classes=40, dtype=torch.float32):
    torch.manual_seed(0)
    logits = torch.randn(n_rows, n_classes, device=DEVICE, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, n_classes, (n_rows,), device=DEVICE)
    labels[1] = -100
    return logits, labels


def both(function, logits, *args):
    loss = function(logits, *args)
    return loss, torch.autograd.grad(loss.sin().sum(), logits)[0]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_one_graph(backend):
    logits, labels = problem()
    weight = torch.rand(40, device=DEVICE)
    tokens = torch.tensor(5, device=DEVICE)

    def losses(x, y, w, tokens):
        rows = cross_entropy_rows(x * 2, y, **OPTIONS)
        return torch.stack([
            cross_entropy(x * 2, y),
            cross_entropy(x, y, w, reduction="sum", **OPTIONS),
            cross_entropy(x, y, reduction="none").sum(),
            cross_entropy(x, y, denominator=tokens),
            cross_entropy(x, x.softmax(-1), w, **OPTIONS),
            (rows.loss + rows.lse).sum() + (rows.predicted == y).sum(),
        ])  # fmt: skip

    expected = both(losses, logits, labels, weight, tokens)
    compiled = both(torch.compile(losses, fullgraph=True, backend=backend), logits, labels, weight, tokens)
    torch.testing.assert_close(compiled, expected)


def test_module_in_a_compiled_training_step():
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 40, device=DEVICE)
    criterion = CrossEntropyLoss(dim=-1, label_smoothing=0.1)
    hidden, labels = torch.randn(2, 3, 8, device=DEVICE), torch.randint(0, 40, (2, 3), device=DEVICE)
    step = lambda hidden: criterion(model(hidden)[:, :-1], labels[:, 1:])  # noqa: E731
    expected = torch.autograd.grad(step(hidden), model.parameters())
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(hidden), model.parameters())
    torch.testing.assert_close(compiled, expected)


@pytest.mark.parametrize("dynamic", [None, True])
def test_batch_sizes_compile_at_most_twice(dynamic):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(cross_entropy, fullgraph=True, backend=counter, dynamic=dynamic)
    for n_rows in (6, 7, 9, 12, 30):
        logits, labels = problem(n_rows)
        torch.testing.assert_close(both(compiled, logits, labels), both(cross_entropy, logits, labels))
    assert counter.frame_count <= 2


def test_torch_func_inside_compile():
    logits, labels = torch.randn(3, 4, 16, device=DEVICE), torch.randint(0, 16, (3, 4), device=DEVICE)
    for transform in (torch.func.grad, lambda f: torch.vmap(torch.func.grad(f)), torch.vmap, torch.func.hessian):
        mapped = transform not in (torch.func.grad, torch.func.hessian)
        args = (logits, labels) if mapped else (logits[0], labels[0])
        compiled = torch.compile(transform(cross_entropy), fullgraph=True, backend="aot_eager")(*args)
        torch.testing.assert_close(compiled, transform(cross_entropy)(*args))


def test_class_weights_that_train():
    logits, labels = problem()
    weight = torch.rand(40, device=DEVICE, requires_grad=True)
    loss = lambda x, w: cross_entropy(x, labels, w, **OPTIONS)  # noqa: E731
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(logits, weight)
    expected = torch.autograd.grad(loss(logits, weight), (logits, weight))
    torch.testing.assert_close(torch.autograd.grad(compiled, (logits, weight)), expected)


def test_compiled_views_and_time_shifts():
    logits = torch.randn(2, 5, 16, device=DEVICE, requires_grad=True)
    tokens = torch.randint(0, 16, (2, 5), device=DEVICE)

    def losses(x):
        shifted = cross_entropy(x[:, :-1], tokens[:, 1:], dim=-1)
        return shifted + cross_entropy(x.transpose(0, 1), tokens.T, dim=-1) + cross_entropy(x.mT, tokens)

    compiled = both(torch.compile(losses, fullgraph=True, backend="aot_eager"), logits)
    torch.testing.assert_close(compiled, both(losses, logits))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_autograd():
    logits, labels = problem()
    expected = both(cross_entropy, logits, labels)
    loss = cross_entropy(logits, labels)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        loss.sin().backward()
    torch.testing.assert_close(logits.grad, expected[1])


def test_export():
    class Loss(torch.nn.Module):
        def forward(self, logits, labels):
            return cross_entropy(logits, labels, **OPTIONS, implementation="triton")

    logits, labels = problem()
    # More than what eager calls sum in one launch.
    rows = torch.export.Dim("rows", min=2, max=2 * reductions.FEW_ROWS)
    program = torch.export.export(Loss(), (logits.detach(), labels), dynamic_shapes=({0: rows}, {0: rows}))
    assert "ce_kernels.row_statistics" in str(program.graph)
    more, more_labels = problem(11)
    torch.testing.assert_close(program.module()(more, more_labels), cross_entropy(more, more_labels, **OPTIONS))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_writing_to_what_the_backward_reads_is_noticed(backend, reduction):
    logits, labels = problem()

    def step(leaf):
        x = leaf * 1
        loss = cross_entropy(x, labels, reduction=reduction)
        x[:, 0] = -torch.inf
        return loss.sum()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.compile(step, backend=backend)(logits).backward()


def test_a_symbolic_denominator():
    logits, labels = problem()
    batch = torch.export.Dim("batch", min=2)

    class PerRow(torch.nn.Module):
        def forward(self, logits, labels):
            return cross_entropy(logits, labels, denominator=2 * logits.shape[0])

    shapes = ({0: batch}, {0: batch})
    program = torch.export.export(PerRow(), (logits, labels), dynamic_shapes=shapes).module()
    traced = make_fx(lambda x, y: cross_entropy(x, y, denominator=y.numel() / 2), tracing_mode="symbolic")
    traced = traced(logits.detach(), labels)
    for n_rows in (6, 4):
        x, y = logits.detach()[:n_rows], labels[:n_rows]
        total = F.cross_entropy(x, y, reduction="sum")
        torch.testing.assert_close(program(x, y), total / (2 * n_rows))
        torch.testing.assert_close(traced(x, y), total / (n_rows / 2))


class Selected(torch.nn.Module):
    """Rows that are known only when the program runs, each selection with a size of its own."""

    def forward(self, logits, labels):
        return cross_entropy(logits[labels != -100], labels[labels != -100], **OPTIONS)


class Counted(torch.nn.Module):
    def forward(self, logits, labels):
        n = (labels != -100).sum().item()
        return cross_entropy(logits[:n], labels[:n].clamp(min=0), **OPTIONS)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("module", [Selected(), Counted()], ids=lambda module: type(module).__name__)
def test_sizes_known_only_when_the_program_runs(module, strict):
    logits, labels = (x.detach() for x in problem())
    program = torch.export.export(module, (logits, labels), strict=strict).module()
    fewer = labels.clone()
    fewer[:3] = -100
    for some in (labels, fewer):
        torch.testing.assert_close(program(logits, some), module(logits, some))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(logits, labels), module(logits, labels))


def test_one_row_with_class_weights():
    logits, labels = problem()
    weight = torch.rand(logits.shape[1], dtype=logits.dtype, device=logits.device)
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    row, label = logits[0].detach().requires_grad_(), labels[0].clamp(min=0)
    found = both(lambda x: compiled(x, label, weight), row)
    torch.testing.assert_close(found, both(lambda x: F.cross_entropy(x, label, weight), row))


def test_patch_inside_a_compiled_program():
    logits, labels = problem()

    def loss(x):
        with patch():
            return F.cross_entropy(x, labels, label_smoothing=0.1)

    theirs = F.cross_entropy
    expected = both(lambda x: F.cross_entropy(x, labels, label_smoothing=0.1), logits)
    torch.testing.assert_close(both(torch.compile(loss, backend="aot_eager", fullgraph=True), logits), expected)
    assert F.cross_entropy is theirs


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_what_is_exported_can_be_trained(kind, reduction):
    class Loss(torch.nn.Module):
        def forward(self, logits, target):
            rows = cross_entropy(logits, target, reduction=reduction, **OPTIONS, implementation="triton")
            return rows.sum()

    logits, labels = problem()
    target = labels if kind == "hard" else logits.detach().softmax(-1)
    exported = torch.export.export(Loss(), (logits.detach(), target)).module()
    leaves = [logits.detach().clone().requires_grad_()]
    if kind == "soft":
        target = target.clone().requires_grad_()
        leaves.append(target)
    found = torch.autograd.grad(exported(leaves[0], target), leaves)
    torch.testing.assert_close(found, torch.autograd.grad(Loss()(leaves[0], target), leaves))
    with pytest.raises(RuntimeError, match="got create_graph=True in an exported or compiled graph"):
        torch.autograd.grad(exported(leaves[0], target), leaves, create_graph=True)


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx(tracing_mode):
    logits, labels = problem()

    def step(logits, labels):
        loss = cross_entropy(logits, labels)
        return loss, torch.autograd.grad(loss, logits)[0]

    graph = make_fx(step, tracing_mode=tracing_mode)(logits, labels)
    assert "row_gradients" in str(graph.graph)
    logits, labels = problem(6 if tracing_mode != "symbolic" else 9)
    torch.testing.assert_close(graph(logits, labels), step(logits, labels))


# opcheck itself does.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_operators_are_what_they_say(dtype):
    logits, labels = problem(dtype=dtype)
    logits = logits.detach()
    for implementation in ("reference", "triton"):
        scalars = ops.flat_spec(RowSpec(Options(**OPTIONS), implementation))
        for target in (labels, logits.softmax(-1)):
            statistics = (logits, target, torch.rand(40, device=DEVICE), True, *scalars)
            library.opcheck(torch.ops.ce_kernels.row_statistics, statistics)
            trained = (logits.clone().requires_grad_(), target, None, False, *scalars)
            library.opcheck(torch.ops.ce_kernels.row_statistics, trained)
            loss, lse, target_sum, _ = torch.ops.ce_kernels.row_statistics(*statistics)
            gradients = (logits, target, None, lse, target_sum, loss, lse, target is not labels, *scalars)
            library.opcheck(torch.ops.ce_kernels.row_gradients, gradients)


LAYOUTS = {
    "classes_first": lambda x: x.movedim(1, -1),
    "channels_last": lambda x: x.unsqueeze(-1).to(memory_format=torch.channels_last).movedim(1, -1),
    "crop": lambda x: x[..., :17].movedim(1, -1),
    "cut": lambda x: x[..., 3:16],
    "steps": lambda x: x[:, ::2, ::2],
    "permuted": lambda x: x.permute(2, 0, 1),
    "expanded": lambda x: x[:1].expand(4, -1, -1),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_the_operator_are_laid_out_as_its_fake_says(layout, implementation):
    torch.manual_seed(0)
    logits = LAYOUTS[layout](torch.randn(3, 5, 20, device=DEVICE))
    scalars = ops.flat_spec(RowSpec(Options(), implementation))
    for target in (torch.randint(0, logits.shape[-1], logits.shape[:-1], device=DEVICE), logits.softmax(-1)):
        _, lse, target_sum, _ = torch.ops.ce_kernels.row_statistics(logits, target, None, True, *scalars)
        soft = target.is_floating_point()
        gradients = (logits, target, None, lse, target_sum, lse, None, soft, *scalars)
        library.opcheck(torch.ops.ce_kernels.row_gradients, gradients)
        dlogits, dtarget = torch.ops.ce_kernels.row_gradients(*gradients)
        assert dlogits.stride() == torch.empty_like(logits).stride()
        assert not soft or dtarget.stride() == torch.empty_like(target).stride()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_gradients_have_the_layout_of_their_logits(backend):
    logits = torch.randn(3, 5, 20, device=DEVICE, requires_grad=True)
    labels = torch.randint(0, 5, (3, 20), device=DEVICE)
    compiled = torch.compile(lambda x: cross_entropy(x, labels), fullgraph=True, backend=backend)
    torch.testing.assert_close(both(compiled, logits), both(lambda x: cross_entropy(x, labels), logits))
    assert both(compiled, logits)[1].stride() == logits.stride()


def test_meta_and_fake_tensors():
    logits, labels = (
        torch.empty(3, 7, device="meta", requires_grad=True),
        torch.empty(3, dtype=torch.long, device="meta"),
    )
    loss = cross_entropy(logits, labels)
    assert loss.device.type == "meta"
    assert torch.autograd.grad(loss, logits)[0].shape == (3, 7)
    with torch._subclasses.FakeTensorMode():
        logits = torch.empty(3, 7, dtype=torch.bfloat16, requires_grad=True)
        loss = cross_entropy(logits, torch.zeros(3, dtype=torch.long), label_smoothing=0.1)
        assert loss.dtype == torch.float32
        assert torch.autograd.grad(loss, logits)[0].dtype == torch.bfloat16


def test_donation_under_compile_says_what_to_write():
    logits, labels = problem()
    donated = lambda x: cross_entropy(x * 1, labels, donate_logits=True)  # noqa: E731
    with pytest.raises(Exception, match="donate_logits=False"):
        torch.compile(donated, fullgraph=True, backend="eager")(logits)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_kernels_really_run_in_compiled_graphs(backend):
    torch.manual_seed(0)
    logits = torch.randn(64, 32000, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 32000, (64,), device="cuda")
    compiled = torch.compile(lambda x: cross_entropy(x * 2, labels), fullgraph=True, backend=backend)
    torch.autograd.grad(compiled(logits), logits)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        loss = compiled(logits)
        (gradient,) = torch.autograd.grad(loss, logits)
    names = " ".join(event.key for event in profile.key_averages())
    assert "cross_entropy_stats_kernel" in names
    assert "cross_entropy_grad_kernel" in names
    leaf = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(leaf * 2, labels)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(expected, leaf)[0], rtol=3e-2, atol=1e-6)
