"""Sharded vocabularies, DTensors and FSDP2 in real processes: each case of `tests.sharded` over 2 and over 4 of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import sharded

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", params=[2, 4], ids=["2 processes", "4 processes"])
def output(request, tmp_path_factory):
    """What a run of every case printed: one start of the processes serves them all."""
    file = tmp_path_factory.mktemp("gloo") / "rendezvous"
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    size = request.param
    command = lambda rank: [sys.executable, "-m", "tests.sharded", str(rank), str(size), str(file)]  # noqa: E731
    processes = [
        subprocess.Popen(
            command(rank), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(size)
    ]
    try:
        return "\n".join(process.communicate(timeout=240)[0] for process in processes)
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("case", [case.__name__ for case in sharded.CASES])
def test_sharded(output, case):
    assert f"passed {case}\n" in output, output[-4000:]
