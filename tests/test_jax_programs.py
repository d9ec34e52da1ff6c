"""What JAX programs do beside training steps: loops, remat policies, donation, NaN checks, versions of the stack."""

import re
from functools import partial
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from benchmarks.memory_jax import temporary_bytes
from jax_api import backend, cross_entropy, cross_entropy_rows
from tests.cases import ALL
from tests.conftest import HAS_GPU
from tests.hlo import passes_over
from tests.test_transforms import close, each_implementation, plain_loss

interpreted = pytest.mark.skipif(HAS_GPU, reason="tests/test_gpu_jax.py does the same with compiled kernels")


@pytest.fixture
def arrays(rng):
    """Logits of 4 rows × 37 classes, labels with an ignored one, class weights."""
    labels = jnp.asarray(rng.integers(0, 37, 4)).at[2].set(-100)
    return jnp.asarray(rng.normal(size=(4, 37))), labels, jnp.asarray(rng.random(37) + 0.5)


def ours(implementation, **options):
    return lambda x, y, w: cross_entropy(x, y, w, implementation=implementation, **ALL, **options)


@each_implementation
def test_while_loop(arrays, implementation):
    """Gradient descent until the loss is small enough."""
    x, y, w = arrays

    def descend(loss):
        def step(state):
            x, n, _ = state
            value, grad = jax.value_and_grad(loss)(x, y, w)
            return x - 20 * grad, n + 1, value

        return lax.while_loop(lambda state: (state[2] > 2.0) & (state[1] < 9), step, (x, 0, jnp.inf))

    close(jax.jit(lambda: descend(ours(implementation)))(), jax.jit(lambda: descend(plain_loss))())


@each_implementation
def test_vjp_and_linear_transposition(arrays, implementation):
    x, y, w = arrays
    for reduction in ("none", "mean"):
        out, pull = jax.vjp(lambda x, r=reduction: ours(implementation, reduction=r)(x, y, w), x)
        expected, plain_pull = jax.vjp(lambda x, r=reduction: plain_loss(x, y, w, r), x)
        for scale in (1.0, -0.5):
            close(pull(scale * jnp.ones_like(out)), plain_pull(scale * jnp.ones_like(expected)))


POLICIES = ["everything_saveable", "nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable"]


@each_implementation
@pytest.mark.parametrize("policy", [*POLICIES, "names"])
def test_remat_policies(arrays, implementation, policy):
    x, y, w = arrays
    policies = jax.checkpoint_policies
    chosen = policies.save_only_these_names("logits") if policy == "names" else getattr(policies, policy)

    def model(loss):
        def forward(x):
            return loss(checkpoint_name(jnp.sin(x) @ jnp.eye(37), "logits"), y, w)

        return forward

    gradient = jax.jit(jax.grad(jax.checkpoint(model(ours(implementation)), policy=chosen)))(x)
    close(gradient, jax.grad(model(plain_loss))(x))


@each_implementation
def test_donated_logits(arrays, implementation):
    x, y, w = arrays
    expected = jax.value_and_grad(plain_loss)(x, y, w)
    step = jax.jit(jax.value_and_grad(ours(implementation)), donate_argnums=0)
    donated = x + 0
    close(step(donated, y, w), expected)
    assert donated.is_deleted()


@each_implementation
def test_disable_jit(arrays, implementation):
    x, y, w = arrays
    with jax.disable_jit():
        out = jax.value_and_grad(ours(implementation))(x, y, w)
    close(out, jax.value_and_grad(plain_loss)(x, y, w))


@pytest.mark.parametrize("implementation", ["reference", None])
def test_debug_nans_is_quiet_about_masked_classes_and_ignored_rows(arrays, implementation):
    x, y, _ = arrays
    masked = x.at[:, 5:20].set(-jnp.inf).at[2].set(-jnp.inf)
    y = jnp.where(y == -100, -100, 3)

    with jax.debug_nans(True):
        for options in ({}, {"z_loss": 1e-3, "softcap": 20.0, "logit_scale": 0.5}):
            step = jax.value_and_grad(partial(cross_entropy, implementation=implementation, **options))
            for run in (step, jax.jit(step)):
                value, grad = run(masked, y)
                assert np.isfinite(value)
                assert np.isfinite(grad).all()
        rows = cross_entropy_rows(masked[:2], y[:2], implementation=implementation)
        assert np.isfinite(rows.loss).all()


@interpreted
def test_gradient_is_written_over_dead_logits_and_beside_living_ones():
    """On XLA's optimised program, and on the values where XLA must copy."""
    hidden, head, y = jnp.ones((8, 16), jnp.float32), jnp.ones((16, 64), jnp.float32), jnp.arange(8)

    def dead(hidden, head):
        return cross_entropy(hidden @ head, y, implementation="triton")

    def living(hidden, head):
        logits = hidden @ head
        return cross_entropy(logits, y, implementation="triton"), logits

    for function, has_aux, copies in ((dead, False, 0), (living, True, 1)):
        step = jax.jit(jax.value_and_grad(function, (0, 1), has_aux=has_aux))
        program = step.lower(hidden, head).compile().as_text()
        (call,) = re.findall(r"custom-call\([^\n]*xla_buffer_python_cpu_callback[^\n]*", program)
        assert "output_to_operand_aliasing={{3}: (0, {})}" in call
        assert len(re.findall(r"= f32\[8,64\]\S* copy\(", program)) == copies
    (_, logits), _ = step(hidden, head)
    np.testing.assert_array_equal(logits, hidden @ head)


def test_forward_mode_by_two_reverse_passes(arrays):
    """What the documentation offers in its place: the vjp is linear, so its own vjp is the jvp; jacrev of grad."""
    x, y, w = arrays
    tangent = jnp.cos(x)

    def jvp(function):
        out, pull = jax.vjp(function, x)
        return jax.vjp(pull, jnp.ones_like(out))[1]((tangent,))[0]

    for reduction in ("mean", "none"):
        by_two = jvp(lambda x, r=reduction: ours(None, reduction=r)(x, y, w))
        close(by_two, jax.jvp(lambda x, r=reduction: plain_loss(x, y, w, r), (x,), (tangent,))[1])
    close(jax.jacrev(jax.grad(ours(None)))(x, y, w), jax.hessian(plain_loss)(x, y, w))


def test_memory_of_a_train_step_is_planned_for_every_loss():
    assert all(size > 0 for size in temporary_bytes(64, 1000, 32).values())


def dead_code_library(rule, default):
    """A stand-in for jax_triton.triton_lib: its table of rules for unused calls."""
    rules = {} if rule is None else {"call": rule}
    library = ModuleType("library")
    library.pe = SimpleNamespace(dce_rules=rules, _default_dce_rule=default)  # pyright: ignore
    library.triton_kernel_call_p = "call"  # pyright: ignore
    return library


def test_the_rule_of_jax_triton_goes_only_where_jax_calls_it_differently():
    def two(used, equation): ...

    def three(used, live, equation): ...

    for rule, default, kept in ((two, two, True), (two, three, False), (three, three, True), (None, three, False)):
        library = dead_code_library(rule, default)
        backend._mend_dead_code_rule(library)
        assert ("call" in library.pe.dce_rules) == kept


@pytest.mark.parametrize(
    ("found", "compiled_for"), [(["9.0"], None), (["9.0", "9.0"], None), (["9.0", "8.6"], 86), (["8.0", "10.0"], 80)]
)
def test_gpus_of_different_kinds_run_what_the_oldest_can(monkeypatch, found, compiled_for):
    monkeypatch.setattr(backend.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(backend.jax, "devices", lambda: [SimpleNamespace(compute_capability=each) for each in found])
    assert backend.compute_capability() == compiled_for


def test_programs_of_hosts_without_a_gpu_are_for_the_oldest():
    if not HAS_GPU:
        assert backend.compute_capability() == backend.BASELINE_CAPABILITY


@pytest.mark.parametrize(
    ("jax_version", "jax_triton_version", "fits"),
    [
        ((0, 11, 2), "0.4.1", True),
        ((0, 12, 0), "0.4.1", True),
        ((0, 12, 0), "0.5.0.dev1", True),
        ((0, 13, 0), "0.4.1", False),
        ((0, 11, 0), "0.3.1", False),
    ],
)
def test_versions_that_go_together(monkeypatch, jax_version, jax_triton_version, fits):
    monkeypatch.setattr(backend.jax, "__version_info__", jax_version)
    monkeypatch.setattr(backend, "version", lambda name: jax_triton_version)
    assert (backend._obstacle.__wrapped__() is None) == fits


def test_without_jax_triton(monkeypatch):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert backend._obstacle.__wrapped__() == "no jax-triton installed"


def test_passes_over_large_arrays_are_seen_in_a_program():
    x = jnp.ones((64, 128), jnp.float32)

    def passes(function, elements=x.size, **options):
        return passes_over(jax.jit(function, **options).lower(x).compile().as_text(), elements)

    assert passes(lambda x: x, donate_argnums=0) == []
    assert len(passes(lambda x: x * 2.0)) == 1
    assert len(passes(lambda x: x.sum())) == 1, "a read alone, too"
    assert len(passes(lambda x: (x @ x.T, jnp.sin(x)))) == 2
    assert passes(lambda x: x * 2.0, elements=x.size + 1) == []
