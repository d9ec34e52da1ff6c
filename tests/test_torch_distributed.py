"""Sharded vocabularies, DTensors and FSDP2 in real processes: the cases of `tests.sharded`."""

import pytest
import torch

from tests import processes, sharded

NAMES = [case.__name__ for case in sharded.CASES]


@pytest.mark.parametrize("size", [2, 4])
def test_every_case_in_processes(size, tmp_path):
    """One start of the processes serves every case: importing PyTorch is most of the time."""
    output = processes.start("tests.sharded", size, tmp_path)
    assert processes.passed(output) == NAMES, output[-4000:]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_every_case_over_nccl(tmp_path):
    output = processes.start("tests.sharded", 2, tmp_path, "cuda")
    assert processes.passed(output) == [name for name in NAMES if name != "mistakes"], output[-4000:]
