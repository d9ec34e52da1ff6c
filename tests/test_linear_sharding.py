"""Linear heads over several devices: rows and vocabulary in JAX, process groups and FSDP2 in PyTorch."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from tests import processes, sharded_linear

ROOT = Path(__file__).parent.parent

SHARDED = ["rows", "vocabulary", "second derivatives", "gradient inside", "mean and rows", "Auto", "Explicit"]


@pytest.fixture(scope="module")
def on_four_devices():
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.linear_on_four_devices"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.splitlines()


@pytest.mark.parametrize("name", SHARDED)
def test_in_jax(on_four_devices, name):
    assert f"{name}: right" in on_four_devices


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What processes print that run the cases of `tests.sharded_linear`, by how many they are."""
    return cache(lambda size: processes.start("tests.sharded_linear", size, tmp_path_factory.mktemp("gloo")))


@pytest.mark.parametrize("case", [case.__name__ for case in sharded_linear.CASES])
def test_in_torch(printed, case):
    assert case in processes.passed(printed(2)), printed(2)[-4000:]


def test_dtensors_over_a_mesh_of_two_dimensions(printed):
    assert processes.passed(printed(4)) == ["dtensor_heads"], printed(4)[-4000:]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_in_torch_over_nccl(tmp_path):
    output = processes.start("tests.sharded_linear", 2, tmp_path, "cuda")
    assert processes.passed(output) == [case.__name__ for case in sharded_linear.CASES], output[-4000:]
