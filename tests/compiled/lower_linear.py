"""Lowers a linear head for CUDA without a GPU, and prints the kernels and loops of its training step."""

import json

import jax
import jax.numpy as jnp

import jax_api
from tests.compiled.lower import custom_calls


def main() -> None:
    n_rows, width, n_classes = 1024, 64, 50304
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((n_rows, width), (width, n_classes))]
    labels = jax.ShapeDtypeStruct((n_rows,), jnp.int32)

    def loss(hidden, kernel, labels):
        return jax_api.linear_cross_entropy(hidden, kernel, labels, max_logits_bytes=256 * n_classes * 2)

    traced = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(*arrays, labels)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    report = {
        "kernels": [(call["kernel"], call["aliases"]) for call in custom_calls(traced)],
        "loops": text.count("stablehlo.while"),
        "matmuls": text.count("stablehlo.dot_general"),
        "logits": [shape for shape in (256, 1024) if f"tensor<{shape}x{n_classes}xbf16>" in text],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
