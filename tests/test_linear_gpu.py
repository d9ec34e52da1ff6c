"""What only a GPU can show of linear heads: memory, no synchronisation, CUDA graphs, the same bits, sums in fp32."""

import warnings

import jax
import jax.numpy as jnp
import pytest
import torch
import torch.nn.functional as F

import jax_api
from torch_api import linear_chunks, linear_cross_entropy, linear_cross_entropy_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch"),
]
MIB = 2**20


@pytest.fixture(autouse=True)
def as_users_run_it():
    # Deterministic mode fills memory, which is neither captured nor counted as a user's.
    torch.use_deterministic_algorithms(False)
    return


def problem(n_rows=1024, width=256, n_classes=32000, dtype=torch.bfloat16):
    torch.manual_seed(0)
    hidden = torch.randn(n_rows, width, device="cuda", dtype=dtype).requires_grad_()
    weight = (torch.randn(n_classes, width, device="cuda") * 0.2).to(dtype).requires_grad_()
    labels = torch.randint(0, n_classes, (n_rows,), device="cuda")
    labels[::5] = -100
    return hidden, weight, labels


@pytest.mark.parametrize(("accumulation", "copies"), [("parameter", 0), ("float32", 1)])
def test_memory_beyond_inputs_and_gradients_is_a_chunk(accumulation, copies):
    hidden, weight, labels = problem(4096, 1024, 64000)

    def step():
        loss = linear_cross_entropy(hidden, weight, labels, accumulation=accumulation, max_logits_bytes=128 * MIB)
        return torch.autograd.grad(loss, (hidden, weight))

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    gradients = 2 * (hidden.numel() + weight.numel())
    beyond = torch.cuda.max_memory_allocated() - before - gradients
    # The fp32 copy lives with the chunk, and after it with the gradient that is made from it.
    assert beyond < 128 * MIB + copies * 4 * weight.numel() + 8 * MIB


@pytest.mark.parametrize("accumulation", ["parameter", "float32"])
def test_memory_in_jax_is_a_chunk(accumulation):
    hidden, weight, labels = problem(4096, 1024, 64000)
    arrays = [jnp.from_dlpack(x.detach()) for x in (hidden, weight, labels)]

    def loss(hidden, weight, labels):
        return jax_api.linear_cross_entropy(
            hidden, weight, labels, class_axis=0, accumulation=accumulation, max_logits_bytes=128 * MIB
        )

    step = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arrays).compile()
    copies = 4 * weight.numel() if accumulation == "float32" else 0
    # cuBLAS has a workspace, of 32 MiB on Hopper.
    assert step.memory_analysis().temp_size_in_bytes < 128 * MIB + copies + 2 * hidden.numel() + 64 * MIB


def test_no_synchronisation():
    hidden, weight, labels = problem()
    bias = torch.zeros(32000, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    tokens = torch.tensor(200, device="cuda")
    budget = {"max_logits_bytes": 10 * MIB}

    def everything():
        for options in ({}, {"reduction": "sum"}, {"reduction": "none"}, {"denominator": tokens}, {"denominator": 2.0}):
            loss = linear_cross_entropy(hidden, weight, labels, bias, **options, **budget).sum() * 2.0
            torch.autograd.grad(loss, (hidden, weight, bias))
        torch.autograd.grad(linear_cross_entropy_rows(hidden, weight, labels, **budget).lse.sum(), hidden)

    everything()  # compiles, which may synchronise
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        try:
            torch.cuda.set_sync_debug_mode("error")
            everything()
        finally:
            torch.cuda.set_sync_debug_mode("default")


# PyTorch 2.11 warns of the warm-up's stream.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
def test_cuda_graph():
    hidden, weight, labels = problem()

    def step():
        loss = linear_cross_entropy(hidden, weight, labels, max_logits_bytes=10 * MIB)
        return loss, *torch.autograd.grad(loss, (hidden, weight))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        hidden.copy_(hidden.flip(0))
        labels.copy_(labels.roll(7))
    graph.replay()
    for x, y in zip(captured, step(), strict=True):
        torch.testing.assert_close(x, y)


def test_same_bits_every_time():
    hidden, weight, labels = problem()

    def step():
        loss = linear_cross_entropy(hidden, weight, labels, max_logits_bytes=10 * MIB)
        return loss, *torch.autograd.grad(loss, (hidden, weight))

    first = step()
    for _ in range(10):
        assert all(torch.equal(x, y) for x, y in zip(step(), first, strict=True))


def test_float32_gradients_of_bfloat16_products_are_not_rounded():
    hidden, weight, labels = problem(dtype=torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, reduction="sum", max_logits_bytes=10 * MIB)
        logits = F.linear(hidden, weight)
    (ours,) = torch.autograd.grad(loss, weight)
    (dlogits,) = torch.autograd.grad(F.cross_entropy(logits.float(), labels, reduction="sum"), logits)
    right = dlogits.T.double() @ hidden.bfloat16().double()
    once = (right.bfloat16().double() - right).norm()
    assert (ours.double() - right).norm() < once
    assert (ours.bfloat16() != ours).any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_with_inductor(reduction):
    hidden, weight, labels = problem()
    torch._dynamo.reset()

    def step(hidden, weight, labels):
        return linear_cross_entropy(hidden * 2, weight, labels, reduction=reduction, max_logits_bytes=10 * MIB).sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        loss = function(hidden, weight, labels)
        results.append((loss, *torch.autograd.grad(loss * 3, (hidden, weight))))
    torch._dynamo.reset()
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=1e-4)


def test_both_front_ends_agree():
    hidden, weight, labels = problem()
    options = {"z_loss": 1e-4, "label_smoothing": 0.1, "max_logits_bytes": 10 * MIB}
    loss = linear_cross_entropy(hidden, weight, labels, **options)
    ours = (loss, *torch.autograd.grad(loss, (hidden, weight)))
    arrays = [jnp.from_dlpack(x.detach()) for x in (hidden, weight)]
    y = jnp.from_dlpack(labels)
    loss, grads = jax.value_and_grad(
        lambda h, w: jax_api.linear_cross_entropy(h, w, y, class_axis=0, **options), (0, 1)
    )(*arrays)
    for x, y in zip(ours, (loss, *grads), strict=True):
        torch.testing.assert_close(x, torch.from_dlpack(y), rtol=2e-2, atol=1e-6)


def test_a_large_sum_is_added_to_in_pieces_without_changing_it(monkeypatch):
    hidden, weight, labels = problem(n_classes=1000)

    def dweight():
        loss = linear_cross_entropy(hidden, weight, labels, max_logits_bytes=MIB)
        return torch.autograd.grad(loss, weight)[0]

    whole = dweight()
    pieces = []
    monkeypatch.setattr(linear_chunks, "_classes_at_once", lambda total: pieces.append(384) or 384)
    torch.testing.assert_close(dweight(), whole, rtol=2**-7, atol=1e-8)
    assert pieces
