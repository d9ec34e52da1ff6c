"""What a JAX user does with linear_cross_entropy: freeze, vmap, remat, shard, derive twice, call it from Flax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from jax_api import cross_entropy, cross_entropy_rows, linear_cross_entropy, linear_cross_entropy_rows
from tests.test_lowering import run_compiled

OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0}


def problem(n_rows=7, width=5, n_classes=12, dtype=jnp.float64):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape) for shape in ((n_rows, width), (width, n_classes), n_classes)]
    labels = rng.integers(0, n_classes, n_rows)
    labels[1] = -100
    return *(jnp.asarray(x, dtype) for x in arrays), jnp.asarray(labels)


def equations(jaxpr):
    """All equations of a jaxpr and of those inside of it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def matmuls(function, *args) -> int:
    return sum(eqn.primitive.name == "dot_general" for eqn in equations(jax.make_jaxpr(function)(*args).jaxpr))


def largest(function, *args) -> int:
    return max(
        out.aval.size
        for eqn in equations(jax.make_jaxpr(function)(*args).jaxpr)
        for out in eqn.outvars
        if out.aval.shape
    )


@pytest.mark.parametrize(
    ("trained", "count"), [((), 1), ((0,), 2), ((1,), 2), ((2,), 1), ((0, 1), 3), ((0, 1, 2), 3)], ids=str
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_parts_cost_no_matmul(reduction, trained, count):
    hidden, kernel, bias, labels = problem()

    def head(hidden, kernel, bias):
        loss = linear_cross_entropy(hidden, kernel, labels, bias, reduction=reduction, max_logits_bytes=300)
        return loss.sum()

    if not trained:
        assert matmuls(head, hidden, kernel, bias) == count
        return
    assert matmuls(jax.jit(jax.grad(head, trained)), hidden, kernel, bias) == count + (reduction == "none")
    whole = jax.grad(lambda h, k, b: cross_entropy(h @ k + b, labels, reduction=reduction).sum(), trained)
    for x, y in zip(jax.grad(head, trained)(hidden, kernel, bias), whole(hidden, kernel, bias), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_never_more_than_a_chunk_of_logits(reduction):
    hidden, kernel, _, labels = problem(2048, 4, 512, jnp.float32)
    chunk = 128 * 512

    def head(hidden, kernel):
        return linear_cross_entropy(hidden, kernel, labels, reduction=reduction, max_logits_bytes=4 * chunk).sum()

    def whole(hidden, kernel):
        return cross_entropy(hidden @ kernel, labels, reduction=reduction).sum()

    ours, unfused = jax.grad(head, (0, 1)), jax.grad(whole, (0, 1))
    assert largest(ours, hidden, kernel) == chunk
    assert largest(unfused, hidden, kernel) == 2048 * 512
    # What XLA makes of it: a few chunks on the CPU, where the plain operations have temporaries of their own.
    used = [jax.jit(f).lower(hidden, kernel).compile().memory_analysis().temp_size_in_bytes for f in (ours, unfused)]
    assert used[0] < 8 * 4 * chunk
    assert used[1] > 2048 * 512 * 4


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_derivatives_of_derivatives(reduction):
    hidden, kernel, bias, labels = problem(5, 3, 4)

    def head(hidden, kernel, bias):
        return linear_cross_entropy(
            hidden, kernel, labels, bias, reduction=reduction, max_logits_bytes=64, **OPTIONS
        ).sum()

    check_grads(head, (hidden, kernel, bias), order=2, modes=["rev"])
    check_grads(lambda hidden: head(hidden, kernel, bias), (hidden,), order=2, modes=["rev"])


def test_soft_labels_and_denominator_have_gradients():
    hidden, kernel, bias, _ = problem()
    soft = jax.random.uniform(jax.random.key(0), (7, 12), jnp.float64)
    ours, whole = (
        jax.grad(loss, (0, 1, 2, 3, 4))(hidden, kernel, bias, soft, 3.0)
        for loss in (
            lambda h, k, b, t, n: linear_cross_entropy(h, k, t, b, denominator=n, max_logits_bytes=300, **OPTIONS),
            lambda h, k, b, t, n: cross_entropy(h @ k + b, t, denominator=n, **OPTIONS),
        )
    )
    for x, y in zip(ours, whole, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("mapped", [(0, None, 0), (0, 0, 0), (None, 0, None)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vmap(reduction, mapped):
    hidden, kernel, _, labels = problem()
    arrays = [
        x if axis is None else jnp.stack([x, x[::-1]]) for x, axis in zip((hidden, kernel, labels), mapped, strict=True)
    ]

    def head(hidden, kernel, labels):
        return linear_cross_entropy(hidden, kernel, labels, reduction=reduction, max_logits_bytes=300).sum()

    both = jax.vmap(jax.value_and_grad(head, (0, 1)), mapped)(*arrays)
    for i in range(2):
        one = jax.value_and_grad(head, (0, 1))(*(x if a is None else x[i] for x, a in zip(arrays, mapped, strict=True)))
        jax.tree.map(lambda x, y, i=i: np.testing.assert_allclose(x[i], y, rtol=1e-12, atol=1e-15), both, one)
    total = jax.grad(lambda *x: jax.vmap(head, mapped)(*x, arrays[2]).sum(), (0, 1))(*arrays[:2])
    for x, y, axis in zip(total, both[1], mapped, strict=False):
        np.testing.assert_allclose(x, y if axis == 0 else y.sum(0), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_remat_scan_and_jacrev(reduction):
    hidden, kernel, _, labels = problem()

    def head(hidden, kernel):
        return linear_cross_entropy(hidden, kernel, labels, reduction=reduction, max_logits_bytes=300)

    expected = jax.jacrev(head, (0, 1))(hidden, kernel)
    again = jax.jacrev(jax.checkpoint(head), (0, 1))(hidden, kernel)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-15), again, expected)

    def steps(hidden, kernel):
        return jax.lax.scan(lambda total, scale: (total + head(hidden * scale, kernel).sum(), None), 0.0,
                            jnp.arange(1.0, 3.0))[0]  # fmt: skip

    def unrolled(hidden, kernel):
        return head(hidden, kernel).sum() + head(hidden * 2, kernel).sum()

    pairs = zip(jax.grad(steps, (0, 1))(hidden, kernel), jax.grad(unrolled, (0, 1))(hidden, kernel), strict=True)
    for x, y in pairs:
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_is_differentiated_may_change_from_call_to_call(reduction):
    hidden, kernel, _, labels = problem()

    def head(hidden, kernel):
        return linear_cross_entropy(jnp.sin(hidden), kernel, labels, reduction=reduction).sum()

    expected = jax.grad(lambda h, k: cross_entropy(jnp.sin(h) @ k, labels, reduction=reduction).sum(), (0, 1))
    expected = expected(hidden, kernel)
    for policy in (None, jax.checkpoint_policies.dots_saveable):
        for trained in ((0,), (1,), (0, 1), (1,), (0,)):
            grads = jax.grad(jax.checkpoint(head, policy=policy), trained)(hidden, kernel)
            for i, x in zip(trained, grads, strict=True):
                np.testing.assert_allclose(x, expected[i], rtol=1e-10, atol=1e-14)


def test_rows_of_one_head():
    hidden, kernel, bias, labels = problem()
    ours = linear_cross_entropy_rows(hidden[None], kernel, labels[None], bias, max_logits_bytes=300, **OPTIONS)
    whole = cross_entropy_rows(hidden @ kernel + bias, labels, **OPTIONS)
    for x, y in zip(ours, whole, strict=True):
        assert x.shape == (1, 7)
        np.testing.assert_allclose(x[0], y, rtol=1e-12)
    one = linear_cross_entropy(hidden[0], kernel, labels[0], bias, reduction="none")
    np.testing.assert_allclose(one, cross_entropy(hidden[0] @ kernel + bias, labels[0], reduction="none"))


def test_embedding_table_as_head():
    hidden, kernel, _, labels = problem()
    ours = jax.grad(lambda table: linear_cross_entropy(hidden, table, labels, class_axis=0))(kernel.T)
    expected = jax.grad(lambda kernel: linear_cross_entropy(hidden, kernel, labels))(kernel)
    np.testing.assert_allclose(ours, expected.T, rtol=1e-12, atol=1e-15)


def test_flax_head_in_half_precision():
    hidden, _, _, labels = problem(dtype=jnp.bfloat16)
    head = nnx.Linear(5, 12, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    def ours(head):
        bias = head.bias[...]
        return linear_cross_entropy(hidden, head.kernel[...], labels, bias, dtype=jnp.bfloat16, max_logits_bytes=100)

    (loss, grads), (whole, expected) = (
        nnx.value_and_grad(f)(head) for f in (ours, lambda head: cross_entropy(head(hidden), labels))
    )
    np.testing.assert_allclose(loss, whole, rtol=1e-2)
    assert grads["kernel"][...].dtype == jnp.float32
    np.testing.assert_allclose(grads["kernel"][...], expected["kernel"][...], rtol=2e-2, atol=2e-2)
    # Sums of bf16 products in fp32, not rounded on the way.
    assert (grads["kernel"][...].astype(jnp.bfloat16) != grads["kernel"][...]).any()


def test_on_a_gpu_it_is_one_loop_around_the_fused_kernel_in_place():
    lowered = run_compiled("tests.compiled.lower_linear")
    assert lowered == {
        "kernels": [["cross_entropy_fused_kernel", [["3", "0"]]]],
        "loops": 1,
        "matmuls": 3,
        "logits": [256],
    }
