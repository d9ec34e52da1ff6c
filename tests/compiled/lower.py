"""Lowers training, evaluation and row losses for CUDA without a GPU, and prints what each Triton custom call holds."""

import json
import re
import zlib

import jax
import jax.numpy as jnp
from jax._src.lib.mlir import ir

import jax_api

N, V = 64, 50304


def operations(block):
    for op in block.operations:
        yield op
        for region in op.regions:
            for inner in region.blocks:
                yield from operations(inner)


def custom_calls(traced):
    module = traced.lower(lowering_platforms=("cuda",)).compiler_ir()
    calls = []
    for op in operations(module.body):
        if op.name != "stablehlo.custom_call" or "triton" not in str(op.attributes["call_target_name"]):
            continue
        opaque = ir.StringAttr(ir.DictAttr(op.attributes["mhlo.backend_config"])["opaque"]).value_bytes
        proto = zlib.decompress(opaque).decode("latin1")
        alias = r"output_tuple_indices = \[(\d*)\],\s*operand_index = (\d+)"
        calls.append(
            {
                "kernel": re.search(r"cross_entropy_\w+_kernel", proto)[0],
                "aliases": re.findall(alias, str(op.attributes["output_operand_aliases"])),
                "version": re.search(r"\.version (\S+)", proto)[1],
                "target": re.search(r"\.target (\w+)", proto)[1],
                "wide_loads": len(re.findall(r"ld\.global[^\n]*\.v4\.b32", proto)),
                "narrow_loads": len(re.findall(r"ld\.global[^\n]*\.b16", proto)),
                "wide_stores": len(re.findall(r"st\.global[^\n]*\.v4\.b32", proto)),
            }
        )
    return calls


def row_gradients(x, y):
    _, pull = jax.vjp(lambda x: jax_api.cross_entropy(x, y, reduction="none"), x)
    return pull(jnp.arange(N, dtype=jnp.float32))


def main():
    x = jax.ShapeDtypeStruct((N, V), jnp.bfloat16)
    y = jax.ShapeDtypeStruct((N,), jnp.int32)
    functions = {
        "train": jax.value_and_grad(jax_api.cross_entropy),
        "evaluate": jax_api.cross_entropy,
        "rows": row_gradients,
    }
    # Traced once, lowered for both.
    traced = {name: jax.jit(function).trace(x, y) for name, function in functions.items()}
    report: dict = {name: custom_calls(program) for name, program in traced.items()}
    report["cpu"] = any("triton" in program.lower(lowering_platforms=("cpu",)).as_text() for program in traced.values())
    print(json.dumps(report))


if __name__ == "__main__":
    main()
