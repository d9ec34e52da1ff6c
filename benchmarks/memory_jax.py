"""Temporary memory of a jitted Flax train step of a language model's head, by loss, as XLA plans it: nothing is run."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

import jax_api


def optax_bf16(logits: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def optax_f32(logits: Array, labels: Array) -> Array:
    return optax_bf16(logits.astype(jnp.float32), labels)


LOSSES = {"ce-kernels": jax_api.cross_entropy, "Optax bf16": optax_bf16, "Optax f32": optax_f32}


def temporary_bytes(n_rows: int = 4096, n_classes: int = 128256, width: int = 1024) -> dict[str, int]:
    """XLA's temporary bytes of one optimiser step by loss: bf16 head [width, n_classes], SGD, parameters donated.

    The logits alone are 2·n_rows·n_classes bytes, and the head's gradient 2·width·n_classes; compiled for the default
    backend, so it must be a GPU for the figures of the kernels.
    """
    return {name: _step_bytes(loss, n_rows, n_classes, width) for name, loss in LOSSES.items()}


def _step_bytes(loss: Callable[[Array, Array], Array], n_rows: int, n_classes: int, width: int) -> int:
    def make() -> tuple[nnx.Linear, nnx.Optimizer]:
        head = nnx.Linear(width, n_classes, use_bias=False, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        return head, nnx.Optimizer(head, optax.sgd(1e-3), wrt=nnx.Param)

    graph, state = nnx.split(nnx.eval_shape(make))

    def step(state: nnx.State, hidden: Array, labels: Array) -> tuple[nnx.State, Array, Array]:
        head, optimizer = nnx.merge(graph, state)

        def loss_of(head: nnx.Linear, hidden: Array) -> Array:
            return loss(head(hidden), labels)

        # The model below the head needs the gradient of its hidden states.
        value, (grads, dhidden) = nnx.value_and_grad(loss_of, argnums=(0, 1))(head, hidden)
        optimizer.update(head, grads)
        return nnx.split((head, optimizer))[1], value, dhidden

    hidden = jax.ShapeDtypeStruct((n_rows, width), jnp.bfloat16)
    labels = jax.ShapeDtypeStruct((n_rows,), jnp.int32)
    compiled = jax.jit(step, donate_argnums=0).lower(state, hidden, labels).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


if __name__ == "__main__":
    for name, size in temporary_bytes().items():
        print(f"{name:12} {size / 2**30:.2f} GiB")
