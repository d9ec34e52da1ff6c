"""linear_cross_entropy with rows and vocabulary sharded over four devices: prints what is right, for a test to read."""

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
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-14, err_msg=name), found, expected
        )

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

    for of_hidden, of_kernel in ((P("data"), P()), (P(), P(None, "model")), (P("data"), P(None, "model"))):
        placed = [
            jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in ((hidden, of_hidden), (kernel, of_kernel))
        ]
        placed_labels = jax.device_put(labels, NamedSharding(mesh, P(*of_hidden)))
        grad = jax.jit(
            jax.value_and_grad(
                lambda h, k, b, y: linear_cross_entropy(
                    h, k, y, b, class_weight, denominator=7.0, max_logits_bytes=400, **OPTIONS
                ),
                (0, 1, 2),
            )
        )
        check("automatic", grad(*placed, bias, placed_labels))
    print("automatic: right")


if __name__ == "__main__":
    main()
