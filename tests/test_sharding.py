"""Sharded logits in JAX on eight simulated devices: right, sharded as they came, and nothing of their size moves."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_api import cross_entropy, cross_entropy_rows, softmax_cross_entropy_with_integer_labels
from tests import oracle
from tests.cases import ALL
from tests.conftest import HAS_GPU

ROOT = Path(__file__).parent.parent
BATCH, TIME, VOCAB = 4, 6, 32
DEVICES = jax.devices("cpu")
# One mode a process: on a host with a GPU the kernels are compiled, and these devices are the CPU's.
INTERPRETER = pytest.param(
    "triton", marks=pytest.mark.skipif(HAS_GPU, reason="the interpreter needs a process without a GPU")
)
each_implementation = pytest.mark.parametrize("implementation", ["reference", INTERPRETER])
each_mesh = pytest.mark.parametrize("kind", list(AxisType)[:2], ids=lambda kind: kind.name)
SPECS = [
    P(),
    P("data"),
    P("data", "time"),
    P("data", "time", "model"),
    P(None, None, "model"),
    P(None, None, ("time", "model")),
    P(("data", "time"), None, "model"),
    P("model", None, ("time", "data")),
]


def make_mesh(*kinds, shape=(2, 2, 2), names=("data", "time", "model")):
    return jax.make_mesh(shape, names, axis_types=kinds if len(kinds) > 1 else kinds * len(names), devices=DEVICES)


AUTO = make_mesh(AxisType.Auto)


def put(mesh, array, *spec):
    return jax.device_put(array, NamedSharding(mesh, P(*spec)))


@pytest.fixture(scope="module")
def batch():
    """Logits, labels with ignored ones, soft targets, class weights."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH, TIME, VOCAB))
    y = rng.integers(0, VOCAB, (BATCH, TIME)).astype(np.int32)
    y[0, 1] = y[2, 2] = -100
    soft = np.exp(x[::-1]) / np.exp(x[::-1]).sum(-1, keepdims=True)
    return x, y, soft, rng.random(VOCAB) + 0.5


def mean(x, y, w=None, **more):
    return cross_entropy(x, y, w, **ALL, **more)


def none(x, y, w=None, **more):
    return jnp.sin(cross_entropy(x, y, w, reduction="none", **ALL, **more)).sum()


def rows(x, y, w=None, **more):
    out = cross_entropy_rows(x, y, w, **ALL, **more)
    return jnp.sin(out.loss + 2 * out.lse).sum(), out.predicted


def hessian_vector_product(x, y, w=None, **more):
    return (jnp.cos(x) * jax.grad(none)(x, y, w, **more)).sum()


def close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), actual, expected)


def collectives(compiled) -> list[tuple[str, int]]:
    """Every collective of a compiled program with the number of elements that it returns."""
    found = re.findall(
        r"= (.*?) (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)(?:-start)?\(",
        compiled.as_text(),
    )
    sizes = [[np.prod([int(n) for n in s.split(",") if n]) for s in re.findall(r"\[([\d,]*)\]", t)] for t, _ in found]
    return [(kind, int(sum(size))) for (_, kind), size in zip(found, sizes, strict=True)]


@each_mesh
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("loss", [mean, none])
def test_any_sharding(batch, kind, spec, loss):
    """Loss and gradient are those of unsharded logits and keep their sharding; no collective is of the logits' size."""
    x, y, _, _ = batch
    mesh = make_mesh(kind)
    args = put(mesh, x, *spec), put(mesh, y, *spec[:2])
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*args).compile()
    value, grad = compiled(*args)
    close((value, grad), jax.value_and_grad(loss)(x, y))
    assert grad.sharding.is_equivalent_to(args[0].sharding, 3)
    moved = collectives(compiled)
    assert {kind for kind, _ in moved} <= {"all-reduce"}
    # max, then sums of three row vectors; then one or two for the scalars.
    local_rows = BATCH * TIME // np.prod([size_of(entry) for entry in spec[:2]], dtype=int)
    row_sized = [size for _, size in moved if size >= local_rows]
    assert sum(row_sized) <= (4 * local_rows if len(spec) == 3 else 0)
    assert all(size <= 2 for _, size in moved if size < local_rows)


def size_of(entry) -> int:
    return 1 if entry is None else 2 ** len(entry) if isinstance(entry, tuple) else 2


@each_mesh
@pytest.mark.parametrize(
    "spec", [P("data", "time"), P(None, None, ("time", "model")), P("data", None, "model")], ids=str
)
@pytest.mark.parametrize("soft_labels", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("loss", [mean, none])
def test_weights_and_soft_targets_sharded_to_match(batch, kind, spec, soft_labels, loss):
    x, y, soft, w = batch
    mesh = make_mesh(kind)
    target, argnums = (soft, (0, 1, 2)) if soft_labels else (y, (0, 2))
    classes = spec[2] if len(spec) > 2 else None
    args = put(mesh, x, *spec), put(mesh, target, *(spec if soft_labels else spec[:2])), put(mesh, w, classes)
    compiled = jax.jit(jax.value_and_grad(loss, argnums)).lower(*args).compile()
    value, grads = compiled(*args)
    close((value, grads), jax.value_and_grad(loss, argnums)(x, target, w))
    for grad, argument in zip(grads, (args[i] for i in argnums), strict=True):
        assert grad.sharding.is_equivalent_to(argument.sharding, grad.ndim)
    assert all(size <= max(8 * BATCH * TIME, 2 * VOCAB) for _, size in collectives(compiled))
    assert not [size for kind, size in collectives(compiled) if kind != "all-reduce" and size > VOCAB]


@each_mesh
def test_rows_and_second_derivatives(batch, kind):
    x, y, _, w = batch
    mesh = make_mesh(kind)
    args = put(mesh, x, "data", None, ("time", "model")), put(mesh, y, "data"), put(mesh, w)
    close(jax.jit(rows)(*args), rows(x, y, w))
    derivative = jax.value_and_grad(hessian_vector_product, (0, 2))
    close(jax.jit(derivative)(*args), derivative(x, y, w))


@each_mesh
def test_transforms_of_sharded_logits(batch, kind):
    x, y, _, _ = batch
    mesh = make_mesh(kind)
    step = jax.value_and_grad(mean)

    def scanned(x, y):
        return lax.scan(lambda carry, xy: (carry, step(*xy)), 0.0, (x, y))[1]

    cases = [
        (jax.vmap(step), ("data", "time", "model")),
        (jax.vmap(step, (1, 1)), ("data", "time", "model")),
        (jax.vmap(jax.vmap(step)), ("data", "time", "model")),
        (jax.grad(lambda x, y: jax.vmap(mean)(x, y).sum()), ("data", None, "model")),
        (scanned, (None, "time", "model")),
        (jax.grad(jax.checkpoint(lambda x, y: mean(jnp.sin(x), y))), ("data", None, "model")),
    ]
    with jax.set_mesh(mesh):
        for function, spec in cases:
            sharded = jax.jit(function)(put(mesh, x, *spec), put(mesh, y, *spec[:2]))
            close(sharded, jax.jit(function)(x, y))


def test_calls_outside_of_jit_and_arrays_without_sharding(batch):
    x, y, _, _ = batch
    expected = jax.value_and_grad(mean)(x, y)
    close(jax.value_and_grad(mean)(put(AUTO, x, "data", None, "model"), put(AUTO, y, "data")), expected)
    for kind in list(AxisType)[:2]:
        with jax.set_mesh(make_mesh(kind)):
            close(jax.jit(jax.value_and_grad(mean))(x, y), expected)


def test_labels_and_logits_sharded_differently(batch):
    x, y, _, w = batch
    expected = jax.value_and_grad(mean)(x, y, w)
    for kinds in ((AxisType.Auto,), (AxisType.Explicit,), (AxisType.Auto, AxisType.Auto, AxisType.Explicit)):
        mesh = make_mesh(*kinds)
        for logits, labels in (((), ("data", "time")), (("data", None, "model"), ()), ((None, "time"), ("data",))):
            args = put(mesh, x, *logits), put(mesh, y, *labels), put(mesh, w, "time")
            close(jax.jit(jax.value_and_grad(mean))(*args), expected)


def test_lengths_that_the_mesh_does_not_divide(batch):
    """XLA pads such shards, and padding is neither a class nor a row."""
    x, y, _, _ = batch
    x, y = x[:3, :, :30], y[:3].clip(-100, 29)

    def constrained(x, y):
        return mean(
            lax.with_sharding_constraint(jnp.sin(x), NamedSharding(AUTO, P("data", None, ("time", "model")))), y
        )

    close(jax.jit(jax.value_and_grad(constrained))(x, y), jax.value_and_grad(lambda x, y: mean(jnp.sin(x), y))(x, y))


def test_empty_and_single_rows(batch):
    x, y, _, _ = batch
    grad = jax.jit(jax.grad(mean))
    assert grad(put(AUTO, x[:0], None, "time", "model"), y[:0]).shape == (0, TIME, VOCAB)
    close(grad(put(AUTO, x[0, 0], ("time", "model")), y[0, 0]), jax.grad(mean)(x[0, 0], y[0, 0]))


def test_optax_losses_gather_nothing(batch):
    x, y, _, _ = batch
    args = put(AUTO, x, "data", None, "model"), put(AUTO, y.clip(0), "data")
    for where in (False, True):

        def loss(x, y, where=where):
            return softmax_cross_entropy_with_integer_labels(x, y, where=x < 1.5 if where else None).sum()

        compiled = jax.jit(jax.value_and_grad(loss)).lower(*args).compile()
        close(compiled(*args), jax.value_and_grad(loss)(x, y.clip(0)))
        assert {kind for kind, _ in collectives(compiled)} == {"all-reduce"}


# axis_name: inside jax.shard_map.


def in_shard_map(loss, spec, check_vma, summed=(), **options):
    """loss of (x, y, w) on local arrays whose vocabulary is sharded over the last entry of spec, summed over rows."""
    batch_axes = spec[0] or ()

    def local(x, y, w):
        value = loss(x, y, w, axis_name=spec[2], **options)
        return lax.psum(value, batch_axes) if batch_axes else value

    target = spec if summed else P(spec[0])
    return jax.shard_map(local, mesh=AUTO, in_specs=(spec, target, P(spec[2])), out_specs=P(), check_vma=check_vma)


@pytest.mark.parametrize("spec", [P("data", None, "model"), P(None, None, ("model", "data"))], ids=str)
@pytest.mark.parametrize("check_vma", [True, False])
@each_implementation
def test_axis_name(batch, spec, check_vma, implementation):
    x, y, soft, w = batch
    for target, argnums in ((y, (0, 2)), (soft, (0, 1, 2))):
        is_soft = target is soft
        total = float(TIME * BATCH if is_soft else np.where(y == -100, 0, w[y.clip(0)]).sum())
        for loss, options in ((none, {}), (mean, {"denominator": total})):
            sharded = in_shard_map(loss, spec, check_vma, is_soft, implementation=implementation, **options)
            close(
                jax.jit(jax.value_and_grad(sharded, argnums))(x, target, w),
                jax.value_and_grad(lambda *a, loss=loss, options=options: loss(*a, **options), argnums)(x, target, w),
            )


@each_implementation
def test_axis_name_divides_by_the_weights_of_all_slices(batch, implementation):
    x, y, _, w = batch
    sharded = in_shard_map(mean, P(None, None, ("data", "model")), True, implementation=implementation)
    close(jax.jit(jax.value_and_grad(sharded, (0, 2)))(x, y, w), jax.value_and_grad(mean, (0, 2))(x, y, w))


@each_implementation
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("kind", list(AxisType)[:2], ids=lambda kind: kind.name)
def test_axis_name_on_mesh_axes_of_one_device(batch, shape, kind, implementation):
    x, y, _, _ = batch
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(kind,) * 2, devices=DEVICES[: np.prod(shape)])

    def local(x, y):
        return lax.psum(none(x, y, axis_name="model", implementation=implementation), "data")

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(P("data", None, "model"), P("data")), out_specs=P())
    args = put(mesh, x, "data", None, "model"), put(mesh, y, "data")
    close(jax.jit(jax.value_and_grad(sharded))(*args), jax.value_and_grad(none)(x, y))


def test_axis_name_under_transforms(batch):
    x, y, _, _ = batch

    def total(x, y, **more):
        return cross_entropy(x, y, reduction="sum", **ALL, **more)

    def of(wrap):
        def local(x, y):
            return lax.psum(wrap(lambda x, y: total(x, y, axis_name="model"), x, y), "data")

        return jax.shard_map(local, mesh=AUTO, in_specs=(P("data", None, "model"), P("data")), out_specs=P())

    def scanned(loss, x, y):
        start = lax.pcast(jnp.zeros(()), ("data",), to="varying")
        return lax.scan(lambda carry, xy: (carry + loss(*xy), None), start, (x, y))[0]

    wraps = [
        lambda loss, x, y: jax.vmap(loss)(x, y).sum(),
        scanned,
        lambda loss, x, y: lax.cond(lax.psum(x.sum(), "model") > 1e9, lambda x, y: 0 * loss(x, y), loss, x, y),
        lambda loss, x, y: jax.checkpoint(loss)(x, y),
        lambda loss, x, y: lax.map(lambda xy: loss(*xy), (x, y), batch_size=2).sum(),
    ]
    for wrap in wraps:
        close(jax.jit(jax.value_and_grad(of(wrap)))(x, y), jax.value_and_grad(total)(x, y))
    stacked = np.stack([x, x + 1]), np.stack([y, y])
    plain = of(lambda loss, x, y: loss(x, y))
    close(jax.jit(jax.vmap(jax.value_and_grad(plain)))(*stacked), jax.vmap(jax.value_and_grad(total))(*stacked))


@pytest.mark.parametrize("kind", list(AxisType)[:2], ids=lambda kind: kind.name)
@pytest.mark.parametrize("manual", [("data",), ("model",), ("data", "model")], ids=str)
def test_shard_map_over_some_axes_of_the_mesh(batch, kind, manual):
    x, y, _, _ = batch
    mesh = make_mesh(kind)
    data, model = ("data" if "data" in manual else None), ("model" if "model" in manual else None)
    for check_vma in (True, False):

        def local(x, y):
            loss = none(x, y, axis_name=model)
            return lax.psum(loss, "data") if data else loss

        sharded = jax.shard_map(
            local, mesh=mesh, in_specs=(P(data, None, model), P(data)), out_specs=P(), axis_names=set(manual),
            check_vma=check_vma,
        )  # fmt: skip
        args = put(mesh, x, "data", "time", "model"), put(mesh, y, "data", "time")
        close(jax.jit(jax.value_and_grad(sharded))(*args), jax.value_and_grad(none)(x, y))


@pytest.mark.skipif(HAS_GPU, reason="the interpreter needs a process without a GPU")
def test_kernels_asked_for_where_they_cannot_run(batch):
    x, y, _, _ = batch
    sharded = jax.shard_map(
        lambda x, y: mean(x, y, implementation="triton"),
        mesh=AUTO, in_specs=(P("data"), P("data")), out_specs=P("data"), axis_names={"data"},
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"got implementation='triton' where XLA shards some axes .*; write shard_map"):
        jax.jit(lambda x, y: sharded(x, y))(x, y)


# Rows that merge in a special way: columns 0-3 and 4-7 are two slices.
inf = np.inf
SPECIAL = np.array(
    [
        [-inf, -inf, -inf, -inf, 0.3, 1.0, -2.0, 0.5],  # a masked slice beside the label's
        [-inf, -inf, -inf, -inf, 0.3, 1.0, -2.0, 0.5],  # the label in a masked slice: +inf
        [-inf] * 8,  # a masked row: NaN
        [np.nan, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0],  # ignored
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8],  # label out of range
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8],  # −1 is no class
        [90.0, 0.0, 0.0, 0.0, 85.0, 0.0, 0.0, 0.0],  # confident
        [1.0, 3.0, -inf, 0.0, 3.0, 1.0, 3.0, 0.0],  # ties: the lowest class is predicted
        [1.0, 3.0, -inf, 0.0, 3.0, np.nan, 3.0, 0.0],  # NaN poisons, and is predicted
        [1.0, 3.0, -inf, 0.0, 3.0, 2.0, 3.0, -inf],  # the label masked
    ]
)
SPECIAL_LABELS = np.array([5, 1, 2, -100, 8, -1, 0, 6, 0, 2], np.int32)


@pytest.mark.parametrize(
    ("form", "implementation"),
    [
        ("auto", None),
        ("explicit", None),
        ("axis_name", "reference"),
        pytest.param("axis_name", *INTERPRETER.values, marks=INTERPRETER.marks),
    ],
)
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_slices_merge_by_the_contract(form, implementation, z_loss, label_smoothing):
    options = {"z_loss": z_loss, "label_smoothing": label_smoothing}
    mesh = make_mesh(AxisType.Explicit if form == "explicit" else AxisType.Auto, shape=(2,), names=("model",))
    dloss = np.linspace(1.0, 2.0, len(SPECIAL))

    def both(x, y, **more):
        out = cross_entropy_rows(x, y, implementation=implementation, **options, **more)
        loss, pull = jax.vjp(
            lambda x: cross_entropy(x, y, reduction="none", implementation=implementation, **options, **more), x
        )
        return out.loss, out.lse, out.predicted, loss, pull(dloss)[0]

    if form == "axis_name":
        specs = P(None, "model"), P()
        run = jax.shard_map(
            lambda x, y: both(x, y, axis_name="model"), mesh=mesh, in_specs=specs, out_specs=(P(),) * 4 + specs[:1]
        )
    else:
        run = both
    out = jax.jit(run)(put(mesh, SPECIAL, None, "model"), put(mesh, SPECIAL_LABELS))
    expected = oracle.rows(SPECIAL, SPECIAL_LABELS, oracle.Options(**options))
    gradients = oracle.gradients(
        SPECIAL, SPECIAL_LABELS, oracle.Options(**options), dloss, None, unit_roundoff_out=0, unit_roundoff=0, c=0
    )
    for value, right in zip(out, (expected.loss, expected.lse, expected.predicted, expected.loss), strict=False):
        np.testing.assert_allclose(value, right, rtol=1e-12)
    np.testing.assert_allclose(out[4], gradients.dlogits, rtol=1e-10, atol=1e-300)


def test_mistakes_in_axis_name(batch):
    x, y, _, _ = batch
    with pytest.raises(
        ValueError, match=r"got axis_name='model' where the manual mesh axes are \[\]; required: mesh ax"
    ):
        mean(x, y, axis_name="model")
    with pytest.raises(TypeError, match=r"got axis_name=3; required: a mesh axis name, or a tuple of them; write"):
        mean(x, y, axis_name=3)
    with pytest.raises(ValueError, match="got axis_name='mapped' where the manual mesh axes are"):
        jax.vmap(lambda x: mean(x, y, axis_name="mapped"), 2, axis_name="mapped")(x.reshape(BATCH, TIME, 2, -1))
    misspelt = jax.shard_map(lambda x, y: mean(x, y, axis_name="m"), mesh=AUTO, in_specs=P("data"), out_specs=P())
    with pytest.raises(ValueError, match=r"got axis_name='m' where the manual mesh axes are \['data', 'time', 'model'"):
        misspelt(x, y)


@st.composite
def layouts(draw):
    """A mesh over at most eight devices, and a spec that uses each of its axes at most once."""
    shape = draw(st.sampled_from([(8,), (2, 4), (4, 2), (2, 2, 2), (1, 8), (2, 1, 4), (1,), (2,)]))
    names = tuple("abc"[: len(shape)])
    places = draw(st.lists(st.sampled_from([0, 1, 2, None]), min_size=len(names), max_size=len(names)))
    entries = [tuple(name for name, place in zip(names, places, strict=True) if place == axis) for axis in range(3)]
    sizes = dict(zip(names, shape, strict=True))
    multiples = draw(st.tuples(*[st.integers(1, 2)] * 2, st.integers(1, 9)))
    lengths = [m * int(np.prod([sizes[n] for n in entry])) for m, entry in zip(multiples, entries, strict=True)]
    return shape, names, P(*(entry or None for entry in entries)), lengths


@settings(max_examples=12)
@given(
    layout=layouts(),
    kind=st.sampled_from(list(AxisType)[:2]),
    soft_labels=st.booleans(),
    weighted=st.booleans(),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    options=st.fixed_dictionaries(
        {
            "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
            "z_loss": st.sampled_from([0.0, 1e-3]),
            "softcap": st.sampled_from([None, 5.0]),
            "logit_scale": st.sampled_from([1.0, -2.0]),
        }
    ),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
    seed=st.integers(0, 2**16),
)
def test_any_mesh_spec_and_options(layout, kind, soft_labels, weighted, reduction, options, dtype, seed):
    shape, names, spec, lengths = layout
    mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(shape), devices=DEVICES[: np.prod(shape)])
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=lengths) * 3).astype(dtype)
    y = rng.integers(0, lengths[2], lengths[:2]).astype(np.int32)
    y[0, 0] = -100
    target = np.exp(rng.normal(size=lengths)).astype(dtype) if soft_labels else y
    w = rng.random(lengths[2]).astype(np.float32) if weighted else None

    def loss(x, target, w):
        value = cross_entropy(x, target, w, reduction=reduction, **options)
        return jnp.where(jnp.isnan(value), 0.0, jnp.sin(value)).sum()

    args = (
        put(mesh, x, *spec),
        put(mesh, target, *(spec if soft_labels else spec[:2])),
        None if w is None else put(mesh, w, spec[2]),
    )
    value, grad = jax.jit(jax.value_and_grad(loss))(*args)
    expected = jax.value_and_grad(loss)(x, target, w)
    tolerance = {"float16": 2e-3, "float32": 1e-4, "float64": 1e-9}[dtype]
    np.testing.assert_allclose(value, expected[0], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(
        np.asarray(grad, np.float64), np.asarray(expected[1], np.float64), rtol=tolerance, atol=tolerance
    )
    assert grad.sharding.is_equivalent_to(args[0].sharding, 3)


def test_two_processes():
    """A mesh over two processes, data × vocabulary, against one process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed", str(process), str(port)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for process in range(2)
    ]  # fmt: skip
    try:
        for process in processes:
            out, err = process.communicate(timeout=240)
            assert process.returncode == 0, err[-3000:]
            assert "as one process" in out
    finally:
        for process in processes:
            process.kill()
