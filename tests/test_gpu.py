"""What only a GPU can show: no synchronisation, the same bits every time, offsets beyond 2³¹, memory."""

import warnings

import jax
import jax.numpy as jnp
import pytest
import torch
import torch.nn.functional as F

import jax_api
from ce_kernels import Options
from torch_api import cross_entropy, cross_entropy_rows, launch
from torch_api.rows import Inputs, RowSpec

pytestmark = pytest.mark.gpu


def problem(n_rows=256, n_classes=32000, dtype=torch.bfloat16):
    torch.manual_seed(0)
    logits = torch.randn(n_rows, n_classes, device="cuda", dtype=dtype) * 3
    labels = torch.randint(0, n_classes, (n_rows,), device="cuda")
    labels[::5] = -100
    return logits, labels


def test_no_synchronisation():
    logits, labels = problem()
    weight, tokens = torch.rand(32000, device="cuda"), torch.tensor(200, device="cuda")
    leaf = logits.requires_grad_()

    def everything():
        for options in (
            {},
            {"reduction": "sum"},
            {"reduction": "none"},
            {"denominator": tokens},
            {"denominator": 200.0},
            {"weight": weight, "label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 30.0, "logit_scale": 0.5},
        ):
            loss = cross_entropy(leaf, labels, **options).sum() * 2.0
            torch.autograd.grad(loss, leaf)
        torch.autograd.grad(cross_entropy_rows(leaf, labels).lse.sum(), leaf)

    everything()  # compiles, which may synchronise
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        try:
            torch.cuda.set_sync_debug_mode("error")
            everything()
            with pytest.raises(RuntimeError, match="synchronizing"):
                leaf.sum().item()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("n_classes", [32000, 128256])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_same_bits_every_time(reduction, n_classes):
    logits, labels = problem(n_classes=n_classes)

    def in_torch():
        leaf = logits.clone().requires_grad_()
        loss = cross_entropy(leaf, labels, reduction=reduction, label_smoothing=0.1)
        return loss.sum(), torch.autograd.grad(loss.sum(), leaf)[0]

    x, y = jnp.from_dlpack(logits), jnp.from_dlpack(labels)

    @jax.jit
    def in_jax(x):
        return jax.value_and_grad(
            lambda x: jax_api.cross_entropy(x, y, reduction=reduction, label_smoothing=0.1).sum()
        )(x)

    loss, grad = in_torch()
    jax_loss, jax_grad = in_jax(x)
    for _ in range(20):
        again = in_torch()
        assert torch.equal(loss, again[0])
        assert torch.equal(grad, again[1])
        again = in_jax(x)
        assert again[0] == jax_loss
        assert (again[1] == jax_grad).all()


def test_programs_that_share_rows_find_room_beside_those_of_other_streams():
    """Each waits for the others of its row, and all streams' programs wait for a place on the device."""
    logits, labels = problem(1024, 128256)

    def step():
        leaf = logits.detach().requires_grad_()
        loss = cross_entropy(leaf, labels)
        return loss, torch.autograd.grad(loss, leaf)[0]

    loss, grad = step()
    streams = [torch.cuda.Stream() for _ in range(8)]
    torch.cuda.synchronize()
    for _ in range(5):
        found = []
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(step())
        torch.cuda.synchronize()
        assert all(torch.equal(a, loss) and torch.equal(da, grad) for a, da in found)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("n_classes", [50257, 65536, 128256, 262144])
def test_rows_that_programs_share(n_classes, smoothing, donate):
    """The label's logit is read before a warp overwrites it in place, and its gradient written behind its block's."""
    logits, labels = problem(512, n_classes)
    spec, plain = (RowSpec(Options(label_smoothing=smoothing), kind) for kind in ("triton", "reference"))
    denominator = torch.tensor(400.0, device="cuda")
    expected, gradient = launch.fused(Inputs(logits, labels, None), denominator, plain)
    for _ in range(10):
        own = logits.clone()
        stats, dlogits = launch.fused(Inputs(own, labels, None), denominator, spec, donate=donate)
        assert (dlogits is own) is donate
        torch.testing.assert_close(stats.loss, expected.loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dlogits, gradient, rtol=2.0**-7, atol=1e-12)


def test_a_graph_of_programs_that_share_rows_is_replayed_with_other_logits():
    logits, labels = problem(256, 128256)
    step = logits.clone().requires_grad_()
    cross_entropy(step, labels)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = cross_entropy(step, labels)
        (grad,) = torch.autograd.grad(loss, step)
    for scale in (1.0, -2.0, 0.5):
        with torch.no_grad():
            step.copy_(logits * scale)
        graph.replay()
        leaf = step.detach().clone().requires_grad_()
        expected = cross_entropy(leaf, labels)
        assert torch.equal(loss, expected)
        assert torch.equal(grad, torch.autograd.grad(expected, leaf)[0])


def test_row_offsets_beyond_31_bits():
    n_rows, n_classes = 17000, 131072
    logits = torch.zeros(n_rows, n_classes, device="cuda", dtype=torch.bfloat16)
    logits[-1] = torch.randn(n_classes, device="cuda")
    labels = torch.full((n_rows,), 7, device="cuda")
    leaf = logits.requires_grad_()
    loss = cross_entropy(leaf, labels, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    last = logits[-1:].detach().double().requires_grad_()
    expected = F.cross_entropy(last, labels[-1:])
    torch.testing.assert_close(loss[-1].double(), expected, rtol=1e-5, atol=1e-5)
    (expected_grad,) = torch.autograd.grad(expected, last)
    torch.testing.assert_close(grad[-1:].double(), expected_grad, rtol=1e-2, atol=1e-9)


def test_memory_of_a_training_step_is_the_logits_and_one_gradient():
    logits, labels = problem(2048, 128256)
    leaf = logits.requires_grad_()
    cross_entropy(leaf, labels)
    size = logits.numel() * logits.element_size()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(cross_entropy(leaf, labels), leaf)
    assert torch.cuda.max_memory_allocated() - before < 1.01 * size


def test_options_and_batch_sizes_do_not_compile_again():
    from ce_kernels import kernels

    kernel = kernels.cross_entropy_fused_kernel
    logits, labels = problem(64, 3000)
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 30.0, "logit_scale": 0.5}
    cross_entropy(logits.requires_grad_(), labels, **options)
    device = torch.cuda.current_device()
    compiled = len(kernel.device_caches[device][0])
    for n_rows in (64, 63, 17, 16, 1):
        for step in range(1, 4):
            changed = {name: value / (1 + step) for name, value in options.items()}
            cross_entropy(logits[:n_rows].clone().requires_grad_(), labels[:n_rows], ignore_index=16 * step, **changed)
    assert len(kernel.device_caches[device][0]) == compiled
