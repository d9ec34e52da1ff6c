"""What only a GPU can show of the PyTorch front end: CUDA graphs, streams, no synchronisation, bits, host time."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from benchmarks import host
from torch_api import cross_entropy, cross_entropy_rows

pytestmark = pytest.mark.gpu
OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 30.0}


def problem(n_rows=256, n_classes=32000, dtype=torch.bfloat16, device="cuda", seed=0):
    torch.manual_seed(seed)
    logits = torch.randn(n_rows, n_classes, device=device, dtype=dtype) * 3
    labels = torch.randint(0, n_classes, (n_rows,), device=device)
    labels[::5] = -100
    return logits, labels


STEPS = {
    "mean": lambda x, y: cross_entropy(x, y, **OPTIONS),
    "none": lambda x, y: cross_entropy(x, y, reduction="none").square().sum(),
    "sum": lambda x, y: cross_entropy(x, y, reduction="sum") * 2.0,
    "donated": lambda x, y: cross_entropy(x * 1, y, donate_logits=True),
    "donated none": lambda x, y: cross_entropy(x * 1, y, reduction="none", donate_logits=True).sum(),
    "denominator": lambda x, y: cross_entropy(x, y, denominator=(y != -100).sum()),
    "rows": lambda x, y: cross_entropy_rows(x, y).lse.sum(),
    "view": lambda x, y: cross_entropy(x.view(4, 64, -1)[:, :-1], y.view(4, 64)[:, 1:], dim=-1),
    "soft": lambda x, y: cross_entropy(x, x.detach().softmax(-1), **OPTIONS),
}
each_step = pytest.mark.parametrize("name", STEPS)


def run(name, leaf, labels):
    loss = STEPS[name](leaf, labels)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@each_step
def test_cuda_graph_replays_with_new_data(name):
    logits, labels = problem()
    leaf = logits.requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(name, leaf, labels)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = run(name, leaf, labels)
    for seed in (1, 2):
        new_logits, new_labels = problem(seed=seed)
        with torch.no_grad():
            leaf.copy_(new_logits)
        labels.copy_(new_labels)
        graph.replay()
        expected = run(name, new_logits.requires_grad_(), new_labels)
        assert torch.equal(loss, expected[0])
        assert torch.equal(gradient, expected[1])


# PyTorch 2.11 warns of the warm-up's stream.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
def test_make_graphed_callables():
    logits, labels = problem()
    leaf = logits.requires_grad_()
    graphed = torch.cuda.make_graphed_callables(lambda x: cross_entropy(x, labels), (leaf,))
    expected = torch.autograd.grad(cross_entropy(leaf, labels), leaf)
    torch.testing.assert_close(torch.autograd.grad(graphed(leaf), leaf), expected)


def test_no_synchronisation():
    logits, labels = problem()
    leaf = logits.requires_grad_()
    for name in STEPS:
        run(name, leaf, labels)  # compiles, which may synchronise
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        try:
            torch.cuda.set_sync_debug_mode("error")
            for name in STEPS:
                run(name, leaf, labels)
            with torch.no_grad():
                cross_entropy(logits, labels)
            with pytest.raises(RuntimeError, match="synchronizing"):
                leaf.sum().item()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_streams():
    """Steps on several streams at once, each with its own data, give what one stream gives."""
    problems = [problem(64, seed=seed) for seed in range(4)]
    expected = [run("mean", logits.clone().requires_grad_(), labels) for logits, labels in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    for _ in range(5):
        results = []
        for stream, (logits, labels) in zip(streams, problems, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results.append(run("mean", logits.clone().requires_grad_(), labels))
        torch.cuda.synchronize()
        for got, want in zip(results, expected, strict=True):
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])


def test_launches_that_overlap_wait_for_each_other():
    """Steps that the host has queued, each behind writes to its labels: a row's loss is another one every time.

    That every kernel waits before it reads is what tests/compiled/compile_all.py sees; without, steps are rarely wrong.
    """
    logits, labels = problem(16384, 4608)
    leaf, own = logits.requires_grad_(), torch.empty_like(labels)
    for turn in range(1, 6):
        labels = labels.roll(turn)
        labels[: 1000 * turn] = -100
        expected = F.cross_entropy(leaf.float(), labels)
        wanted = torch.autograd.grad(expected, leaf)[0]
        torch.cuda._sleep(4_000_000)
        own.copy_(labels)
        loss = cross_entropy(leaf, own)
        gradient = torch.autograd.grad(loss, leaf)[0]
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)
        torch.testing.assert_close(gradient, wanted, rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize("name", ["mean", "none", "rows", "donated", "soft"])
def test_the_same_bits_100_times(name):
    logits, labels = problem()
    leaf = logits.requires_grad_()
    loss, gradient = run(name, leaf, labels)
    for _ in range(100):
        again = run(name, leaf, labels)
        assert torch.equal(loss, again[0])
        assert torch.equal(gradient, again[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_classes", [1000, 50257, 128256])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-3}, {"softcap": 30.0}], ids=str)
def test_a_second_backward_has_the_bits_of_the_first(options, n_classes, dtype):
    logits, labels = problem(64, n_classes, dtype)
    leaf = logits.requires_grad_()
    loss = cross_entropy(leaf, labels, **options)
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0].clone() for _ in range(2))
    assert torch.equal(first, second)


def test_a_device_that_is_not_the_current_one(monkeypatch):
    if torch.cuda.device_count() < 2:
        # The guard is taken all the same.
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
        logits, labels = problem(16, 1000)
        expected = F.cross_entropy(logits.float(), labels)
        torch.testing.assert_close(cross_entropy(logits, labels), expected)
        return
    logits, labels = problem(16, 1000, device="cuda:1")
    loss, gradient = run("mean", logits.requires_grad_(), labels)
    assert loss.device == gradient.device == torch.device("cuda:1")
    on_first = run("mean", logits.detach().to("cuda:0").requires_grad_(), labels.to("cuda:0"))
    assert torch.equal(loss.cpu(), on_first[0].cpu())
    assert torch.equal(gradient.cpu(), on_first[1].cpu())


@pytest.mark.parametrize("offset", [1, 3, 4])
@pytest.mark.parametrize("n_classes", [1000, 1001])
def test_rows_that_start_anywhere(offset, n_classes):
    """Rows whose first element is not aligned to 16 bytes: offsets into storage, odd strides, two levels of rows."""
    torch.manual_seed(0)
    base = torch.randn(4 * 9 * 1024 + 8, device="cuda", dtype=torch.bfloat16)
    flat = base[offset : offset + 36 * n_classes].view(4, 9, n_classes)
    odd = base[offset:].as_strided((4, 9, n_classes), (9 * 1021, 1021, 1))
    labels = torch.randint(0, n_classes, (4, 9), device="cuda")
    for view, y in ((flat, labels), (flat[:, :-1], labels[:, 1:]), (odd, labels), (odd[:, 1:], labels[:, 1:])):
        leaf = view.detach().requires_grad_()
        loss = cross_entropy(leaf, y, dim=-1)
        rows = view.detach().double().reshape(-1, n_classes).requires_grad_()
        expected = F.cross_entropy(rows, y.flatten())
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
        (right,) = torch.autograd.grad(expected, rows)
        (gradient,) = torch.autograd.grad(loss, leaf)
        torch.testing.assert_close(gradient.reshape(rows.shape).double(), right, rtol=1e-2, atol=1e-7)


def test_what_is_compiled_for_aligned_inputs_is_not_launched_for_others():
    """Calls of the same shapes: the first compile loads of 16 bytes and of one label type."""
    logits, labels = problem(16, 4096)
    memory = torch.randn(16 * 4096 + 1, device="cuda", dtype=torch.bfloat16)
    weights = torch.rand(4096 + 1, device="cuda")
    for soft, weight in ((memory[:-1], weights[:-1]), (memory[1:], weights[1:])):
        target = soft.view(16, 4096)
        found = cross_entropy(logits, target, weight)
        torch.testing.assert_close(found, F.cross_entropy(logits.float(), target.float(), weight), rtol=1e-4, atol=1e-4)
    for y in (labels, labels.int(), labels):
        leaf = logits.detach().clone().requires_grad_()
        found = torch.autograd.grad(cross_entropy(leaf, y), leaf)[0]
        right = torch.autograd.grad(F.cross_entropy(leaf.float(), labels), leaf)[0]
        torch.testing.assert_close(found, right, rtol=1e-2, atol=1e-6)


def test_ignored_rows_between_boundaries_are_not_read():
    # An allocation of its own, with nothing before it: a loop that runs backwards faults.
    torch.cuda.empty_cache()
    leaf = torch.zeros(512, 50257, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.full((512,), -100, device="cuda")
    for reduction in ("mean", "none"):
        loss = cross_entropy(leaf, labels, reduction=reduction)
        gradient = torch.autograd.grad(loss.sum(), leaf)[0]
        assert not gradient.any()


def test_two_level_views_of_every_length_compile_once():
    from ce_kernels import kernels

    kernel = kernels.cross_entropy_fused_kernel
    logits = torch.randn(4, 70, 1024, device="cuda")
    labels = torch.zeros(4, 70, dtype=torch.long, device="cuda")

    def step(length):
        cross_entropy(logits[:, :length].detach().requires_grad_(), labels[:, :length], dim=-1)

    device = torch.cuda.current_device()
    step(33)
    compiled = len(kernel.device_caches[device][0])
    for length in (17, 31, 47, 50, 63):
        step(length)
    assert len(kernel.device_caches[device][0]) == compiled


def test_host_time_above_the_bare_launch():
    torch.use_deterministic_algorithms(False)  # which fills memory
    results = host.measure(64, 1024)
    above = {name: us - results[f"{name}: bare"] for name, us in results.items() if not name.endswith("bare")}
    # Other work on the host counts here: the figures are the benchmarks', this notices a call that costs a multiple.
    assert above["forward none"] < 200, above
    assert above["forward mean"] < 250, above
    assert above["train mean"] < 1500, above
