"""One of two processes of a program over a mesh across them: `python -m tests.distributed PROCESS PORT`."""

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_api import cross_entropy

OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 30.0}


def loss(x, y):
    return cross_entropy(x, y, **OPTIONS)


def main(process: int, port: int) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
    assert len(jax.devices()) == 8
    assert len(jax.local_devices()) == 4
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 6, 32)).astype(np.float32)
    y = rng.integers(0, 32, (4, 6)).astype(np.int32)
    y[0, 1:3] = -100
    expected, expected_grad = jax.value_and_grad(loss)(jnp.asarray(x), jnp.asarray(y))
    tokens = float((y != -100).sum())

    for kind in (AxisType.Auto, AxisType.Explicit):
        # In the second mesh the classes of one row lie on both hosts.
        for names in (("data", "model"), ("model", "data")):
            mesh = jax.make_mesh((2, 4), names, axis_types=(kind, kind))
            specs = P("data", None, "model"), P("data")

            def by_name(x, y):
                mean = cross_entropy(x, y, axis_name="model", denominator=tokens, **OPTIONS)
                return jax.lax.psum(mean, "data")

            in_shard_map = jax.shard_map(by_name, mesh=mesh, in_specs=specs, out_specs=P())
            logits, labels = (
                jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index, a=array: a[index])
                for array, spec in zip((x, y), specs, strict=True)
            )
            for function in (loss, in_shard_map):
                value, grad = jax.jit(jax.value_and_grad(function))(logits, labels)
                np.testing.assert_allclose(value, expected, rtol=1e-5)
                assert grad.sharding.is_equivalent_to(logits.sharding, 3)
                for shard in grad.addressable_shards:
                    right = np.asarray(expected_grad)[shard.index]
                    np.testing.assert_allclose(shard.data, right, rtol=1e-4, atol=1e-7)
    print("as one process")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
