"""JAX transforms over the public functions, on the plain operations and on the kernels."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_api import cross_entropy, cross_entropy_rows, linear_cross_entropy
from tests.cases import ALL

each_implementation = pytest.mark.parametrize("implementation", ["reference", "triton", None])


@pytest.fixture
def batch(rng):
    """Three problems of 4 rows × 37 classes: logits, labels with ignored ones, soft targets, class weights."""
    labels = jnp.asarray(rng.integers(0, 37, (3, 4))).at[1, 2].set(-100)
    soft = jax.nn.softmax(jnp.asarray(rng.normal(size=(3, 4, 37))))
    return jnp.asarray(rng.normal(size=(3, 4, 37))), labels, soft, jnp.asarray(rng.random((3, 37)) + 0.5)


def plain_loss(x, y, w, reduction="mean"):
    """The contract with ALL options, written out once more in the plainest JAX."""
    x = ALL["softcap"] * jnp.tanh(ALL["logit_scale"] * x / ALL["softcap"])
    t = jax.nn.one_hot(y, x.shape[-1]) if y.ndim < x.ndim else y
    q = w * ((1 - ALL["label_smoothing"]) * t + ALL["label_smoothing"] / x.shape[-1])
    lse = jax.nn.logsumexp(x, -1)
    rows = (q * (lse[..., None] - x)).sum(-1) + ALL["z_loss"] * lse**2
    if y.ndim == x.ndim:
        return rows if reduction == "none" else rows.mean()
    rows = jnp.where(y == -100, 0.0, rows)
    return rows if reduction == "none" else rows.sum() / jnp.where(y == -100, 0.0, w[y]).sum()


def ours(implementation, reduction="mean"):
    return lambda x, y, w: cross_entropy(x, y, w, reduction=reduction, implementation=implementation, **ALL)


def close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13), a, b)


@each_implementation
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_jit_grad_and_value_and_grad(batch, implementation, reduction):
    x, y, soft, w = (array[0] for array in batch)
    for target, argnums in ((y, (0, 2)), (soft, (0, 1, 2))):

        def total(function, target=target, argnums=argnums):
            return jax.value_and_grad(lambda *a: jnp.sin(function(*a)).sum(), argnums)(x, target, w)

        expected = total(lambda x, y, w: plain_loss(x, y, w, reduction))
        close(total(ours(implementation, reduction)), expected)
        close(total(jax.jit(ours(implementation, reduction))), expected)
        with jax.disable_jit():
            close(total(ours("reference", reduction)), expected)


@each_implementation
@pytest.mark.parametrize("in_axes", [(0, 0, None), (0, None, None), (None, 0, None), (0, 0, 0), (None, None, 0)])
def test_vmap(batch, implementation, in_axes):
    x, y, soft, w = batch
    for target in (y, soft):
        args = [a if axis == 0 else a[0] for a, axis in zip((x, target, w), in_axes, strict=True)]
        close(jax.vmap(ours(implementation), in_axes)(*args), jax.vmap(plain_loss, in_axes)(*args))
        gradient = jax.vmap(jax.grad(ours(implementation)), in_axes)(*args)
        close(gradient, jax.vmap(jax.grad(plain_loss), in_axes)(*args))
        of_sum = jax.grad(lambda x: jax.vmap(ours(implementation), in_axes)(x, *args[1:]).sum())(args[0])  # noqa: B023
        close(of_sum, jax.grad(lambda x: jax.vmap(plain_loss, in_axes)(x, *args[1:]).sum())(args[0]))  # noqa: B023


@each_implementation
def test_vmap_over_nothing(batch, implementation):
    x, y, _, w = batch
    gradient = jax.vmap(jax.grad(ours(implementation)), (0, None, None))(x[:0], y[0], w[0])
    assert gradient.shape == (0, 4, 37)
    assert jax.vmap(ours(implementation), (None, None, 0))(x[0], y[0], w[:0]).shape == (0,)


@each_implementation
def test_nested_vmap(batch, implementation):
    x, y, _, w = batch
    nested = lambda f: jax.vmap(jax.vmap(jax.grad(f), (0, None, None)), (None, 0, None))(x, y, w[0])  # noqa: E731
    close(nested(ours(implementation)), nested(plain_loss))


def test_vmap_is_one_launch(batch):
    x, y, _, w = batch
    program = jax.make_jaxpr(jax.vmap(jax.grad(lambda x, y: cross_entropy(x, y, w[0], implementation="triton"))))(x, y)
    assert str(program).count("buffer_callback[") + str(program).count("triton_kernel_call[") == 1
    assert "scan" not in str(program)


@each_implementation
def test_jacrev(batch, implementation):
    x, y, _, w = (array[0] for array in batch)
    close(jax.jacrev(ours(implementation, "none"))(x, y, w), jax.jacrev(lambda *a: plain_loss(*a, "none"))(x, y, w))


@each_implementation
def test_scan_cond_and_map(batch, implementation):
    x, y, _, w = batch

    def loops(loss):
        def step(carry, xy):
            value, grad = jax.value_and_grad(loss)(*xy, w[0])
            return carry + grad, jax.lax.cond(value > 0, lambda x: loss(x, xy[1], w[0]), lambda x: 0.0, xy[0])

        scanned = jax.lax.scan(step, jnp.zeros_like(x[0]), (x, y))
        return scanned, jax.lax.map(lambda xy: loss(*xy, w[0]), (x, y), batch_size=2)

    close(jax.jit(lambda: loops(ours(implementation)))(), jax.jit(lambda: loops(plain_loss))())


@each_implementation
def test_remat(batch, implementation):
    x, y, _, w = (array[0] for array in batch)
    policy = jax.checkpoint_policies.nothing_saveable
    for wrap in (jax.checkpoint, lambda f: jax.checkpoint(f, policy=policy)):
        loss = wrap(lambda x: ours(implementation)(jnp.sin(x), y, w))
        close(jax.jit(jax.grad(loss))(x), jax.grad(lambda x: plain_loss(jnp.sin(x), y, w))(x))


@each_implementation
def test_hessian_vector_product(batch, implementation):
    x, y, _, w = (array[0] for array in batch)

    def product(loss):
        return jax.grad(lambda x: jnp.vdot(jax.grad(loss)(x, y, w), jnp.cos(x)))(x)

    close(product(ours(implementation)), product(plain_loss))


@each_implementation
def test_hessian_vector_product_beside_rows_left_out(batch, implementation):
    x, y, _, _ = (array[0] for array in batch)

    def loss(x):
        rows = cross_entropy(x, y, reduction="none", implementation=implementation)
        return jnp.where(jnp.arange(4) == 1, 0.0, rows).sum()

    product = jax.grad(lambda x: jnp.vdot(jax.grad(loss)(x), jnp.ones_like(x)))(x.at[1].set(jnp.nan))
    assert np.isfinite(product).all()


@each_implementation
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_beside_ignored_rows_of_any_size(implementation, reduction):
    x, y = jnp.array([[1000.0, 0.0, 0.0], [1.0, 2.0, 3.0]]), jnp.array([-100, 1])

    def second(x, y):
        def loss(x):
            return cross_entropy(x, y, reduction=reduction, implementation=implementation).sum()

        return jax.grad(lambda x: (jax.grad(loss)(x) ** 2).sum())(x)

    found = second(x, y)
    assert not found[0].any()
    close(found[1:], second(x[1:], y[1:]))


@each_implementation
def test_second_derivatives_where_the_upstream_gradient_is_zero(batch, implementation):
    """The gradient is linear in its upstream: learning to reweight starts at 0 and needs that derivative."""
    x, y, soft, w = (array[0] for array in batch)
    for target, argnums in ((y, (0, 2)), (soft, (0, 1, 2))):

        def by_weight_of_rows(loss, target=target, argnums=argnums):
            def outer(eps):
                inner = jax.grad(lambda *a: (eps * loss(*a)).sum(), argnums)(x, target, w)
                return sum(jnp.sin(g + jnp.arange(g.shape[-1])).sum() for g in inner)

            return jax.grad(outer)(jnp.zeros(4))

        def at_a_minimum(loss, target=target):
            start = loss(x, target, w)
            gradient = jax.grad(lambda x: ((loss(x, target, w) - start) ** 2).sum())
            return jax.grad(lambda x: jnp.vdot(gradient(x), jnp.cos(x)))(x)

        for derivative in (by_weight_of_rows, at_a_minimum):
            close(derivative(ours(implementation, "none")), derivative(lambda *a: plain_loss(*a, "none")))


def test_calls_outside_of_jit_compile_once(batch, caplog):
    x, y, _, w = (array[0] for array in batch)
    call = lambda: jax.value_and_grad(lambda x: cross_entropy(x, y, w))(x)  # noqa: E731
    call()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        call()
    assert [record.message for record in caplog.records if "Compiling" in record.message] == []


@each_implementation
def test_rows_transform_too(batch, implementation):
    x, y, _, w = batch
    rows = jax.vmap(lambda x, y: cross_entropy_rows(x, y, w[0], implementation=implementation, **ALL))(x, y)
    assert rows.predicted.dtype == jnp.int32
    close(rows.loss, jax.vmap(lambda x, y: plain_loss(x, y, w[0], "none"))(x, y))
    assert rows.predicted.tolist() == x.argmax(-1).tolist()


def test_traced_denominator_is_differentiated(batch):
    x, y, _, _ = (array[0] for array in batch)
    derivative = jax.jit(jax.grad(lambda d: cross_entropy(x, y, denominator=d)))(4.0)
    assert float(derivative) == pytest.approx(-float(cross_entropy(x, y, reduction="sum")) / 16)


@each_implementation
def test_forward_mode_of_reductions(batch, implementation):
    x, y, soft, w = (array[0] for array in batch)
    for target, argnums in ((y, (0, 2)), (soft, (0, 1, 2))):

        def along(function, target=target, argnums=argnums):
            def of(*chosen):
                arrays = [x, target, w]
                for i, array in zip(argnums, chosen, strict=True):
                    arrays[i] = array
                return function(*arrays)

            primals = tuple((x, target, w)[i] for i in argnums)
            tangents = tuple(jnp.cos(primal) for primal in primals)
            out, linear = jax.linearize(of, *primals)
            return jax.jvp(of, primals, tangents), out, linear(*tangents), jax.jacfwd(of)(*primals)

        close(along(ours(implementation)), along(plain_loss))
        close(jax.jit(lambda: along(ours(implementation)))(), along(plain_loss))
    reverse_of_forward = jax.jacrev(jax.jacfwd(ours(implementation)))(x, y, w)
    close(reverse_of_forward, jax.hessian(plain_loss)(x, y, w))


def test_forward_mode_says_what_to_write_instead(batch):
    x, y, _, _ = (array[0] for array in batch)
    message = (
        r"got forward-mode differentiation .*; required: reverse mode.*; write jax.vjp or jax.jacrev; jax.jacrev\("
    )

    def rows(x):
        return cross_entropy(x, y, reduction="none")

    for call in (
        lambda: jax.jvp(rows, (x,), (x,)),
        lambda: jax.jacfwd(rows)(x),
        lambda: jax.hessian(lambda x: cross_entropy(x, y))(x),
        lambda: jax.jvp(lambda x: cross_entropy_rows(x, y).lse, (x,), (x,)),
        lambda: jax.jvp(lambda x: linear_cross_entropy(x, x.T, jnp.arange(len(x))), (x,), (x,)),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    with pytest.raises(TypeError, match="can't apply forward-mode autodiff"):
        jax.jit(lambda x: jax.jvp(rows, (x,), (x,)))(x)


def test_eval_shape_and_dtypes():
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64):
        x = jax.ShapeDtypeStruct((2, 3, 5), dtype)
        y = jax.ShapeDtypeStruct((2, 3), jnp.int32)
        loss, grad = jax.eval_shape(jax.value_and_grad(cross_entropy), x, y)
        assert loss.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
        assert (grad.shape, grad.dtype) == (x.shape, dtype)


WITHOUT_X64 = """
import jax, jax.numpy as jnp, numpy as np, optax, jax_api
assert not jax.config.jax_enable_x64
x = jax.random.normal(jax.random.key(0), (4, 30))
y = np.array([3, 29, 0, 7])  # int64 in NumPy, int32 in JAX
for implementation in (None, "triton"):
    ours = lambda x: jax_api.cross_entropy(x, y, implementation=implementation)
    theirs = lambda x: optax.softmax_cross_entropy_with_integer_labels(x, jnp.asarray(y)).mean()
    a, da = jax.jit(jax.value_and_grad(ours))(x)
    b, db = jax.value_and_grad(theirs)(x)
    assert a.dtype == jnp.float32
    np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_allclose(da, db, rtol=1e-5, atol=1e-8)
"""


def test_without_x64():
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_X64]
    result = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
