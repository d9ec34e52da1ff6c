"""What the compiler makes of the kernels, on a host without a GPU: the custom call, its aliases, its PTX.

Compiled kernels need a process without the interpreter, so the modules of `tests.compiled` run in their own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run_compiled(module: str) -> dict:
    """The JSON that a module prints in a process where Triton compiles and JAX sees no GPU."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"JAX_PLATFORMS": "cpu", "TRITON_DEFAULT_FP_FUSION": "1"}
    result = subprocess.run(
        [sys.executable, "-m", module], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def lowered():
    return run_compiled("tests.compiled.lower")


def test_training_is_the_fused_kernel_in_place_with_16_byte_loads(lowered):
    (call,) = lowered["train"]
    assert call["kernel"] == "cross_entropy_fused_kernel"
    assert call["aliases"] == [["3", "0"]], "dlogits, the last output, is written over the logits, the first operand"
    assert call["wide_loads"] >= 2
    assert call["wide_stores"] >= 1
    assert call["narrow_loads"] == 1, "only the label's logit is read alone"


def test_short_rows_are_trained_in_tiles_read_once(lowered):
    (call,) = lowered["short_rows"]
    assert call["kernel"] == "cross_entropy_tile_fused_kernel"
    assert call["aliases"] == [["3", "0"]]
    assert call["wide_loads"] == call["wide_stores"] >= 1


def test_evaluation_is_one_read(lowered):
    (call,) = lowered["evaluate"]
    assert call["kernel"] == "cross_entropy_stats_kernel"
    assert call["aliases"] == []
    assert call["wide_loads"] >= 1


def test_none_is_statistics_then_gradient(lowered):
    stats, grad = lowered["rows"]
    assert [stats["kernel"], grad["kernel"]] == ["cross_entropy_stats_kernel", "cross_entropy_grad_kernel"]
    assert grad["aliases"] == [["", "0"]], "its only output is written over the logits"


def test_ptx_is_one_that_xla_and_every_supported_gpu_accept(lowered):
    for call in lowered["train"] + lowered["evaluate"] + lowered["rows"]:
        assert call["version"] == "8.8"
        assert call["target"] == "sm_80"


@pytest.mark.parametrize("form", ["axis_name", "explicit"])
def test_every_device_runs_the_kernels_on_its_own_slice(lowered, form):
    stats, grad = lowered[form]
    assert [stats["kernel"], grad["kernel"]] == ["cross_entropy_stats_kernel", "cross_entropy_grad_kernel"]
    for call in (stats, grad):
        assert call["logits"] == "tensor<32x12576xbf16>"
        assert call["wide_loads"] >= 1
    assert grad["aliases"] == [["", "0"]]


def test_programs_that_share_rows_find_zeros(lowered):
    (call,) = lowered["shared_rows"]
    assert call["kernel"] == "cross_entropy_fused_kernel"
    assert call["aliases"] == [["4", "0"]]
    assert call["programs"] == 256 * 16
    assert call["zeroed"] == [256 * 16 * 8], "bytes"
    assert lowered["train"][0]["programs"] == 64
    assert lowered["train"][0]["zeroed"] == []


@pytest.mark.parametrize("form", ["explicit_rows", "one_model_device"])
def test_rows_alone_sharded_are_the_fused_kernel(lowered, form):
    (call,) = lowered[form]
    assert call["kernel"] == "cross_entropy_fused_kernel"
    assert call["logits"] == "tensor<8x50304xbf16>"


def test_export(lowered):
    """jax.export with the custom call declared: through bytes and back."""
    assert lowered["exported"] == {"platforms": ["cuda"], "calls": 1, "out": ["float32[]", "bfloat16[64,50304]"]}


def test_cpu_programs_hold_no_kernel(lowered):
    assert lowered["cpu"] is False


def test_every_kernel_compiles_for_every_dtype_and_from_ampere_to_blackwell_and_for_amd():
    nvidia, amd, two_levels, alone = 2 + 4 + 2, 1, 3 * 2, 2 * 5
    tiles, exchanges, between_boundaries = (3 * 4 + 2) * 3, 2 * 2 + 3 * 3, 3
    assert run_compiled("tests.compiled.compile_all") == {
        "compiled": (nvidia + amd) * 3 * 3 + tiles + exchanges + between_boundaries + two_levels + alone
    }
