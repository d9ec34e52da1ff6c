"""linear_cross_entropy with rows and vocabulary sharded over four devices: prints what is right, for a test to read."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_api import cross_entropy, cross_entropy_rows, linear_cross_entropy, linear_cross_entropy_rows

OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 7.0}


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    hidden, kernel, bias = (jnp.asarray(rng.normal(size=shape)) for shape in ((24, 4), (4, 10), 10))
    labels = jnp.asarray(rng.integers(0, 10, 24)).at[3].set(-100)
    class_weight = jnp.asarray(rng.uniform(0.5, 2.0, 10))
    arrays = (hidden, kernel, bias)

    def whole(hidden, kernel, bias):
        return cross_entropy(hidden @ kernel + bias, labels, class_weight, denominator=7.0, **OPTIONS)

    expected = jax.value_and_grad(whole, (0, 1, 2))(*arrays)

    def check(name: str, found) -> None:
        close(found, expected, name)

    def head(hidden, kernel, bias, labels, class_weight, names=None, reduction="mean"):
        of_reduction = {"denominator": 7.0} if reduction == "mean" else {"reduction": reduction}
        # Five rows of the slice a chunk: two rows over.
        loss = linear_cross_entropy(
            hidden, kernel, labels, bias, class_weight, axis_name=names, max_logits_bytes=200, **of_reduction, **OPTIONS
        )
        return jax.lax.psum(loss if reduction == "mean" else loss.sum() / 7.0, "data")

    by_rows = (P("data"), P(), P(), P("data"), P())
    by_both = (P("data"), P(None, "model"), P("model"), P("data"), P("model"))
    for check_vma in (True, False):
        for reduction in ("mean", "none"):
            for name, specs, names in (("rows", by_rows, None), ("vocabulary", by_both, "model")):

                def sharded(*arrays, names=names, reduction=reduction):
                    return head(*arrays, names=names, reduction=reduction)

                run = jax.shard_map(sharded, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)
                grad = jax.jit(jax.value_and_grad(lambda *x, run=run: run(*x, labels, class_weight), (0, 1, 2)))
                check(name, grad(*arrays))
    print("rows: right\nvocabulary: right")
    for check_vma in (True, False):
        second_derivatives(mesh, check_vma)
    print("second derivatives: right")

    def inside(*arrays):
        return jax.value_and_grad(lambda *x: head(*x, *arrays[3:], names="model"), (0, 1, 2))(*arrays[:3])

    run = jax.shard_map(inside, mesh=mesh, in_specs=by_both, out_specs=(P(), by_both[:3]))
    check("gradient inside", run(*arrays, labels, class_weight))
    print("gradient inside: right")

    def mean_and_rows(*arrays):
        rows = linear_cross_entropy_rows(*arrays[:2], arrays[3], axis_name="model", max_logits_bytes=200)
        return linear_cross_entropy(*arrays[:2], arrays[3], class_weight=arrays[4], axis_name="model"), rows

    specs = (P(), *by_both[1:3], P(), P("model"))
    loss, rows = jax.shard_map(mean_and_rows, mesh=mesh, in_specs=specs, out_specs=P())(*arrays, labels, class_weight)
    np.testing.assert_allclose(loss, cross_entropy(hidden @ kernel, labels, class_weight), rtol=1e-12)
    for x, y in zip(rows, cross_entropy_rows(hidden @ kernel, labels), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12)
    print("mean and rows: right")

    for kind in (AxisType.Auto, AxisType.Explicit):
        for in_context in (False, True):
            sharded_by_types(kind, in_context)
        print(f"{kind.name}: right")


def second_derivatives(mesh: jax.sharding.Mesh, check_vma: bool) -> None:
    """Gradients and gradients of gradients by everything, the divisor too, where the classes are sharded."""
    rng = np.random.default_rng(2)
    arrays = [jnp.asarray(rng.normal(size=shape)) for shape in ((6, 4), (4, 10), 10)]
    labels, factors = jnp.asarray(rng.integers(0, 10, 6)).at[3].set(-100), jnp.asarray(rng.normal(size=6))

    def mean(hidden, kernel, bias, by, names=None):
        return linear_cross_entropy(hidden, kernel, labels, bias, denominator=by, axis_name=names, **OPTIONS)

    def none(hidden, kernel, bias, by, names=None):
        rows = linear_cross_entropy(hidden, kernel, labels, bias, reduction="none", axis_name=names, **OPTIONS)
        return (rows * factors).sum() / by

    def rows(hidden, kernel, bias, by, names=None):
        rows = linear_cross_entropy_rows(hidden, kernel, labels, bias, axis_name=names)
        return ((rows.loss * factors).sum() + (rows.lse**2).sum()) / by

    def squares(gradient):
        return lambda *x: sum((g**2).sum() for g in jax.tree.leaves(gradient(*x)))

    everything = (0, 1, 2, 3)
    for loss in (mean, none, rows):

        def own(*arrays, loss=loss):
            return loss(*arrays, names="model")

        specs = (P(), P(None, "model"), P("model"), P())
        sharded = jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)
        found, expected = (jax.grad(f, everything) for f in (sharded, loss))
        close(jax.jit(found)(*arrays, 7.0), expected(*arrays, 7.0), loss.__name__)
        second, right = (jax.grad(squares(f), everything) for f in (found, expected))
        close(jax.jit(second)(*arrays, 7.0), right(*arrays, 7.0), f"{loss.__name__}, twice")


B, T, D, V = 8, 6, 14, 12


def sharded_by_types(kind: AxisType, in_context: bool) -> None:
    """Under plain jit every device multiplies its own rows and classes, and the weights' gradients are summed once."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)
    rng = np.random.default_rng(1)
    shapes = ((B, T, D), (D, V), V)
    arrays = [jnp.asarray(rng.normal(size=shape)) for shape in shapes]
    labels = jnp.asarray(rng.integers(0, V, (B, T))).at[0, 3].set(-100)
    soft = jnp.asarray(rng.dirichlet(np.ones(V), (B, T)))
    class_weight = jnp.asarray(rng.uniform(0.5, 2.0, V))

    def whole(hidden, kernel, bias, labels):
        return cross_entropy(hidden @ kernel + bias, labels, class_weight, **OPTIONS)

    # Five rows of local classes a chunk at the most.
    def head(hidden, kernel, bias, labels):
        return linear_cross_entropy(
            hidden, kernel, labels, bias, class_weight, max_logits_bytes=5 * V * 8, dtype=jnp.float64, **OPTIONS
        )

    def row_head(*arrays):
        rows = linear_cross_entropy_rows(arrays[0], arrays[1], arrays[3], arrays[2], max_logits_bytes=5 * V * 8)
        return (rows.loss * jnp.cos(jnp.arange(T))).sum() + rows.lse.sum(), rows.predicted

    def whole_rows(hidden, kernel, bias, labels):
        rows = cross_entropy_rows(hidden @ kernel + bias, labels)
        return (rows.loss * jnp.cos(jnp.arange(T))).sum() + rows.lse.sum(), rows.predicted

    layouts = (
        # How hidden, kernel and bias are sharded, and the rows and classes a device has.
        (P("data"), P(), P(), B * T // 2, V),
        (P("data", "model"), P(), P(), B * T // 4, V),
        (P(("data", "model")), P(None, ("data", "model")), P(), B * T // 4, V),
        (P("data"), P(None, "model"), P("model"), B * T // 2, V // 2),
        (P("data"), P("data", "model"), P("model"), B * T // 2, V // 2),
        (P("data", None, "model"), P("model", "data"), P(), B * T // 2, V),
        (P(), P(None, "model"), P(), B * T, V // 2),
        (P(), P(), P(), B * T, V),
        (P(), P("model"), P(), B * T, V),
        (P(None, None, "model"), P("model"), P(), B * T, V),
    )
    train = jax.jit(jax.value_and_grad(head, (0, 1, 2)))
    train_rows = jax.jit(jax.value_and_grad(row_head, (0, 1, 2), has_aux=True))
    of_labels, of_soft = (jax.value_and_grad(whole, (0, 1, 2))(*arrays, target) for target in (labels, soft))
    of_whole_rows = jax.value_and_grad(whole_rows, (0, 1, 2), has_aux=True)(*arrays, labels)
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        for *specs, own_rows, own_classes in layouts:
            placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
            of_rows = P(*(*specs[0], None, None)[:2])
            own, own_soft = (jax.device_put(target, NamedSharding(mesh, of_rows)) for target in (labels, soft))
            close(train(*placed, own), of_labels, f"{kind} {specs}")
            close(train(*placed, own_soft), of_soft, f"{kind} {specs}, soft")
            close(train_rows(*placed, own), of_whole_rows, f"{kind} {specs}, rows")
            text = train.lower(*placed, own).compile().as_text()
            multiplied = {tuple(map(int, dims.split(","))) for dims in re.findall(r"= f64\[([\d,]+)\]\S* dot\(", text)}
            chunks = [shape[0] for shape in multiplied if shape[1] == own_classes and shape[0] != D]
            assert 0 < max(chunks, default=0) * own_classes <= 5 * V, (specs, multiplied)
            assert {shape[1] for shape in multiplied} == {D, own_classes}, (specs, multiplied)
            loops = re.findall(r'"known_trip_count":{"n":"(\d+)"', text)
            assert str(-(-own_rows // max(chunks))) in loops, (specs, own_rows, chunks, loops)
    one = jax.make_mesh((1,), ("data",), axis_types=(kind,), devices=jax.devices()[:1])
    with jax.set_mesh(one):
        close(train(*arrays, labels), of_labels, "one")
    if kind == AxisType.Auto:
        hessian = jax.jit(jax.jacrev(jax.grad(head, 2), 2))(*arrays, labels)
        close(hessian, jax.jacrev(jax.grad(whole, 2), 2)(*arrays, labels), "second derivative")
        each = jax.jit(jax.vmap(jax.grad(head), (0, None, None, 0)))(*placed, labels)
        close(each, jax.vmap(jax.grad(whole), (0, None, None, 0))(*arrays, labels), "vmap")


def close(found, expected, name: str) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-13, err_msg=name), found, expected)


if __name__ == "__main__":
    main()
