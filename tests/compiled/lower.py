"""Lowers programs, sharded and exported ones too, for CUDA without a GPU, and prints what each custom call holds."""

import json
import re
import zlib
from unittest import mock

import jax
import jax.export
import jax.numpy as jnp
import jax_triton
from jax._src.lib.mlir import ir
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_api

N, V = 64, 50304


def operations(block):
    for op in block.operations:
        yield op
        for region in op.regions:
            for inner in region.blocks:
                yield from operations(inner)


def custom_calls(traced):
    return calls_in(traced.lower(lowering_platforms=("cuda",)).compiler_ir())


def calls_in(module):
    calls = []
    for op in operations(module.body):
        if op.name != "stablehlo.custom_call" or "triton" not in str(op.attributes["call_target_name"]):
            continue
        opaque = ir.StringAttr(ir.DictAttr(op.attributes["mhlo.backend_config"])["opaque"]).value_bytes
        proto = zlib.decompress(opaque).decode("latin1")
        alias = r"output_tuple_indices = \[(\d*)\],\s*operand_index = (\d+)"
        calls.append(
            {
                "logits": str(op.operands[0].type),
                "kernel": re.search(r"cross_entropy_\w+_kernel", proto)[0],
                "aliases": re.findall(alias, str(op.attributes["output_operand_aliases"])),
                # The grid's first size of three, and of every array the bytes to zero, where there are any.
                "programs": varint(re.search(r"\x10([\x80-\xff]*[\x00-\x7f])\x18\x01 \x01\*", proto)[1]),
                "zeroed": [varint(size) for size in re.findall(r"\*.\n.\x08([\x80-\xff]*[\x00-\x7f])\x10\x10", proto)],
                "version": re.search(r"\.version (\S+)", proto)[1],
                "target": re.search(r"\.target (\w+)", proto)[1],
                "wide_loads": len(re.findall(r"ld\.global[^\n]*\.v4\.b32", proto)),
                "narrow_loads": len(re.findall(r"ld\.global[^\n]*\.b16", proto)),
                "wide_stores": len(re.findall(r"st\.global[^\n]*\.v4\.b32", proto)),
            }
        )
    return calls


def varint(text):
    """A number as protocol buffers write it: seven bits a byte, the lowest first."""
    return sum((ord(byte) & 127) << 7 * i for i, byte in enumerate(text))


def row_gradients(x, y):
    _, pull = jax.vjp(lambda x: jax_api.cross_entropy(x, y, reduction="none"), x)
    return pull(jnp.arange(N, dtype=jnp.float32))


def sharded_programs():
    """Training on a 2 × 4 mesh, rows over data and classes over model, by axis_name and by explicit sharding."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    tall = jax.make_mesh((8, 1), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)

    def local(x, y):
        loss = jax_api.cross_entropy(x, y, reduction="sum", axis_name="model")
        return jax.lax.psum(loss, "data")

    by_name = jax.shard_map(local, mesh=mesh, in_specs=(P("data", "model"), P("data")), out_specs=P())

    def program(loss, *spec, mesh=mesh):
        x = jax.ShapeDtypeStruct((N, V), jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))
        y = jax.ShapeDtypeStruct((N,), jnp.int32, sharding=NamedSharding(mesh, P("data")))
        return jax.jit(jax.value_and_grad(loss)).trace(x, y)

    return {
        "axis_name": program(by_name, "data", "model"),
        "explicit": program(jax_api.cross_entropy, "data", "model"),
        "explicit_rows": program(jax_api.cross_entropy, ("data", "model")),
        "one_model_device": program(jax_api.cross_entropy, "data", "model", mesh=tall),
    }


def exported(function, *arguments):
    """What the exported program's StableHLO holds after a round trip through bytes."""
    checks = [jax.export.DisabledSafetyCheck.custom_call(jax_triton.CUSTOM_CALL_TARGET_NAME)]
    program = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)(*arguments)
    again = jax.export.deserialize(program.serialize())
    return {
        "platforms": again.platforms,
        "calls": again.mlir_module().count(f"stablehlo.custom_call @{jax_triton.CUSTOM_CALL_TARGET_NAME}"),
        "out": [str(aval) for aval in again.out_avals],
    }


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
    short = jax.ShapeDtypeStruct((N, 128), jnp.bfloat16)
    report["short_rows"] = custom_calls(jax.jit(functions["train"]).trace(short, y))
    # As on a GPU of many multiprocessors.
    with mock.patch("jax_api.launch.shared_rows", return_value=True):
        long = jax.ShapeDtypeStruct((256, 128256), jnp.bfloat16), jax.ShapeDtypeStruct((256,), jnp.int32)
        report["shared_rows"] = custom_calls(jax.jit(functions["train"]).trace(*long))
    report |= {name: custom_calls(program) for name, program in sharded_programs().items()}
    report["exported"] = exported(functions["train"], x, y)
    report["cpu"] = any("triton" in program.lower(lowering_platforms=("cpu",)).as_text() for program in traced.values())
    print(json.dumps(report))


if __name__ == "__main__":
    main()
