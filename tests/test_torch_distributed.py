"""Sharded vocabularies, DTensors and FSDP2 in real processes: the cases of `tests.sharded` over 2 and over 4."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import sharded

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("size", [2, 4])
def test_every_case_in_processes(size, tmp_path):
    """One start of the processes serves every case: importing PyTorch is most of the time."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    command = lambda rank: [sys.executable, "-m", "tests.sharded", str(rank), str(size), str(tmp_path / "meet")]  # noqa: E731
    processes = [
        subprocess.Popen(
            command(rank), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(size)
    ]
    try:
        output = "\n".join(process.communicate(timeout=240)[0] for process in processes)
    finally:
        for process in processes:
            process.kill()
    passed = [line.removeprefix("passed ") for line in output.splitlines() if line.startswith("passed ")]
    assert passed == [case.__name__ for case in sharded.CASES], output[-4000:]
