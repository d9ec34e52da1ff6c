"""Linear heads over several devices: rows and vocabulary in JAX, process groups and FSDP2 in PyTorch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import sharded_linear

ROOT = Path(__file__).parent.parent

SHARDED = ["rows", "vocabulary", "gradient inside", "mean and rows", "Auto", "Explicit"]


@pytest.fixture(scope="module")
def on_four_devices():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.linear_on_four_devices"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.splitlines()


@pytest.mark.parametrize("name", SHARDED)
def test_in_jax(on_four_devices, name):
    assert f"{name}: right" in on_four_devices


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes print that run every case of `tests.sharded_linear`."""
    file = tmp_path_factory.mktemp("gloo") / "rendezvous"
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.sharded_linear", str(rank), "2", str(file)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        return "\n".join(process.communicate(timeout=240)[0] for process in processes)
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("case", [case.__name__ for case in sharded_linear.CASES])
def test_in_torch(two_processes, case):
    assert f"passed {case}\n" in two_processes, two_processes[-4000:]
