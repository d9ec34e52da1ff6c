"""JAX on a GPU: that a program holds the compiled kernels, on meshes and in place, is read from its optimised HLO."""

import re

import jax
import jax.numpy as jnp
import jax_triton
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.memory_jax import temporary_bytes
from ce_kernels import Options
from jax_api import cross_entropy, launch, slices
from jax_api.reference import Upstream
from jax_api.static import Part, Static
from tests.hlo import passes_over

pytestmark = pytest.mark.gpu
N, V = 512, 32000
OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0}


@pytest.fixture(scope="module")
def batch():
    x = (jax.random.normal(jax.random.key(0), (4, N // 4, V)) * 3).astype(jnp.bfloat16)
    y = jax.random.randint(jax.random.key(1), (4, N // 4), 0, V).at[:, ::5].set(-100)
    return x, y


def kernels(compiled) -> int:
    return compiled.as_text().count(f'custom_call_target="{jax_triton.CUSTOM_CALL_TARGET_NAME}"')


def close(actual, expected):
    """To bf16's last bit in gradients."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2.0**-7 if a.dtype == jnp.bfloat16 else 1e-5,
            atol=1e-9,
        ),
        actual,
        expected,
    )  # fmt: skip


def plain(x, y):
    return cross_entropy(x, y, implementation="reference", **OPTIONS)


@pytest.mark.parametrize("kind", list(AxisType)[:2], ids=lambda kind: kind.name)
@pytest.mark.parametrize("spec", [P("data"), P("data", None, "model"), P(None, "data", "model")], ids=str)
def test_sharded_jit_on_a_mesh_of_one_gpu_runs_the_kernel(batch, kind, spec):
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(kind,) * 2, devices=jax.devices()[:1])
    args = [jax.device_put(a, NamedSharding(mesh, P(*spec[: a.ndim]))) for a in batch]
    step = jax.jit(jax.value_and_grad(lambda x, y: cross_entropy(x, y, **OPTIONS))).lower(*args).compile()
    assert kernels(step) == 1
    close(step(*args), jax.jit(jax.value_and_grad(plain))(*batch))


@pytest.mark.parametrize("check_vma", [True, False])
def test_axis_name_on_a_mesh_of_one_gpu_runs_the_kernels(batch, check_vma):
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])
    tokens = (batch[1] != -100).sum()

    def local(x, y):
        return lax.psum(cross_entropy(x, y, axis_name="model", denominator=tokens, **OPTIONS), "data")

    specs = P("data", None, "model"), P("data")
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)
    step = jax.jit(jax.value_and_grad(sharded)).lower(*batch).compile()
    assert kernels(step) == 2
    close(step(*batch), jax.jit(jax.value_and_grad(plain))(*batch))


def test_kernels_inside_control_flow_inside_shard_map(batch):
    mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])

    def local(x, y):
        def step(total, xy):
            loss = cross_entropy(*xy, axis_name="model", reduction="sum", **OPTIONS)
            return total + lax.cond(loss > 0, lambda: loss, lambda: 0 * loss), None

        return lax.scan(step, jnp.zeros(()), (x, y))[0]

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(P(None, None, "model"), P()), out_specs=P())
    step = jax.jit(jax.value_and_grad(sharded)).lower(*batch).compile()
    assert kernels(step) >= 2
    expected = jax.value_and_grad(
        lambda x, y: cross_entropy(x, y, reduction="sum", implementation="reference", **OPTIONS)
    )
    close(step(*batch), jax.jit(expected)(*batch))


def test_slices_of_the_vocabulary_merge(batch):
    """One GPU plays four: statistics and gradients of four slices against those of whole rows."""
    x, y = batch[0].reshape(N, V), batch[1].reshape(N)
    options = Options(label_smoothing=0.1, softcap=30.0)
    static = Static(options, "triton")
    parts = [(x[:, start : start + V // 4], Part(jnp.array([start]), V)) for start in range(0, V, V // 4)]
    each = [launch.stats(static, slice_, y, None, part) for slice_, part in parts]
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *each)
    out = jax.vmap(lambda stats: slices._merge(stats, ("model",)), axis_name="model", out_axes=None)(stacked)
    whole = launch.stats(static, x, y, None, Part(None, V))
    counted = y != -100
    close(out.loss, whole.loss)
    close(out.lse[counted], whole.lse[counted])
    close(out.target_sum, whole.target_sum)
    upstream = Upstream(whole.lse, whole.target_sum, jnp.linspace(0.5, 1.5, N), None)
    grads = [launch.grad(static, slice_, y, None, upstream, part)[0] for slice_, part in parts]
    expected, _ = launch.grad(static, x, y, None, upstream, Part(None, V))
    np.testing.assert_array_equal(jnp.concatenate(grads, 1), expected)


def test_gradient_is_written_over_dead_logits_and_beside_living_ones():
    hidden = jax.random.normal(jax.random.key(2), (N, 64), jnp.bfloat16)
    head = jax.random.normal(jax.random.key(3), (64, V), jnp.bfloat16)
    y = jnp.arange(N)

    def dead(hidden, head):
        return cross_entropy(hidden @ head, y)

    def living(hidden, head):
        logits = hidden @ head
        return cross_entropy(logits, y), logits

    for function, has_aux in ((dead, False), (living, True)):
        step = jax.jit(jax.value_and_grad(function, (0, 1), has_aux=has_aux)).lower(hidden, head).compile()
        program = step.as_text()
        assert kernels(step) == 1
        assert len(re.findall(rf"= bf16\[{N},{V}\]\S* copy(?:-start)?\(", program)) == int(has_aux)
        assert "output_to_operand_aliasing" in program
    (_, logits), _ = step(hidden, head)
    close(logits, jax.jit(jnp.matmul)(hidden, head))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_training_step_is_the_only_pass_over_donated_logits(batch, reduction):
    def loss(x, y):
        return cross_entropy(x, y, reduction=reduction, **OPTIONS)

    step = jax.jit(jax.value_and_grad(loss), donate_argnums=0).lower(*batch).compile()
    assert passes_over(step.as_text(), N * V) == ["custom-call"]
    evaluation = jax.jit(loss).lower(*batch).compile()
    assert passes_over(evaluation.as_text(), N * V) == ["custom-call"]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_rows_that_programs_share(smoothing):
    x = (jax.random.normal(jax.random.key(0), (N, 50304)) * 3).astype(jnp.bfloat16)
    y = jax.random.randint(jax.random.key(1), (N,), 0, 50304)

    def step(implementation):
        return jax.value_and_grad(
            lambda x, y: cross_entropy(x, y, label_smoothing=smoothing, implementation=implementation)
        )

    compiled = jax.jit(step(None)).lower(x, y).compile()
    assert kernels(compiled) == 1
    expected = jax.jit(step("reference"))(x, y)
    for _ in range(5):
        close(compiled(x, y), expected)


def test_a_flax_train_step_needs_one_array_of_the_logits_size():
    n_rows, n_classes, width = 4096, 128256, 1024
    found = temporary_bytes(n_rows, n_classes, width)
    logits, head = 2 * n_rows * n_classes, 2 * width * n_classes
    assert found["ce-kernels"] < 1.1 * (logits + head)
    assert found["ce-kernels"] < found["Optax bf16"]
    assert found["ce-kernels"] < found["Optax f32"]


def test_vmap_scan_and_remat_hold_the_kernels(batch):
    x, y = batch
    step = jax.value_and_grad(lambda x, y: cross_entropy(x, y, **OPTIONS))
    mapped = jax.jit(jax.vmap(step)).lower(x, y).compile()
    assert kernels(mapped) == 1
    scanned = jax.jit(lambda x, y: lax.scan(lambda c, xy: (c, step(*xy)), 0.0, (x, y))[1])
    close(mapped(x, y), scanned(x, y))
    remat = jax.jit(jax.grad(jax.checkpoint(lambda x: cross_entropy(jnp.sin(x), y, **OPTIONS)))).lower(x).compile()
    assert kernels(remat) >= 1
    close(remat(x), jax.jit(jax.grad(lambda x: plain(jnp.sin(x), y)))(x))


def test_export_runs_after_a_round_trip(batch):
    from jax import export

    checks = [export.DisabledSafetyCheck.custom_call(jax_triton.CUSTOM_CALL_TARGET_NAME)]
    step = jax.jit(jax.value_and_grad(lambda x, y: cross_entropy(x, y, **OPTIONS)))
    program = export.export(step, platforms=["cuda"], disabled_checks=checks)(*batch)
    close(export.deserialize(program.serialize()).call(*batch), step(*batch))


@pytest.mark.skipif(jax.default_backend() != "gpu" or jax.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", list(AxisType)[:2], ids=lambda kind: kind.name)
@pytest.mark.parametrize("spec", [P("gpus"), P(None, None, "gpus")], ids=str)
def test_several_gpus_run_the_kernels_on_their_own_parts(batch, kind, spec):
    n = 2 if jax.device_count() < 4 else 4
    mesh = jax.make_mesh((n,), ("gpus",), axis_types=(kind,), devices=jax.devices()[:n])
    args = [jax.device_put(a, NamedSharding(mesh, P(*spec[: a.ndim]))) for a in batch]
    step = jax.jit(jax.value_and_grad(lambda x, y: cross_entropy(x, y, **OPTIONS))).lower(*args).compile()
    assert kernels(step) == (1 if len(spec) == 1 else 2)
    assert "all-gather" not in step.as_text()
    close(step(*args), jax.jit(jax.value_and_grad(plain))(*batch))


def test_optax_chain_trains_alike(batch):
    """A few steps of a linear head in bf16 under Optax, with this loss and with Optax's."""
    hidden = jax.random.normal(jax.random.key(4), (N, 64), jnp.bfloat16)
    y = batch[1].reshape(N).clip(0)
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))

    def train(loss):
        def step(state, _):
            head, optimizer = state
            value, grad = jax.value_and_grad(lambda head: loss(hidden @ head.astype(jnp.bfloat16), y))(head)
            updates, optimizer = chain.update(grad, optimizer)
            return (optax.apply_updates(head, updates), optimizer), value

        head = jnp.zeros((64, V), jnp.float32)
        return jax.jit(lambda: lax.scan(step, (head, chain.init(head)), length=10)[1])()

    theirs = train(lambda x, y: optax.softmax_cross_entropy_with_integer_labels(x.astype(jnp.float32), y).mean())
    ours = train(cross_entropy)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)
    assert ours[-1] < ours[0]
