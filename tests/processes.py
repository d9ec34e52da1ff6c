"""Programs over several processes: started by a test, met over gloo on CPUs or NCCL on GPUs."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parent.parent
# Of the processes: "cpu" or "cuda", where each has a GPU of its own.
DEVICE = os.environ.get("DEVICE_OF_PROCESSES", "cpu")


def start(module: str, size: int, folder: Path, device: str = "cpu") -> str:
    """What `python -m module RANK SIZE FILE` prints in processes of all ranks, one after the other."""
    environment = os.environ | {"DEVICE_OF_PROCESSES": device, "PYTHONWARNINGS": "ignore"}
    if device == "cpu":
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), str(size), str(folder / "meet")],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        return "\n".join(process.communicate(timeout=240)[0] for process in processes)
    finally:
        for process in processes:
            process.kill()


def passed(output: str) -> list[str]:
    """The cases that processes say they have passed."""
    return [line.removeprefix("passed ") for line in output.splitlines() if line.startswith("passed ")]


def run(choose: Callable[[int], list[Callable[[int, int], None]]]) -> None:
    """One process: the cases for so many processes, or those of them that the command line names."""
    rank, size, file, *names = sys.argv[1:]
    rank, size = int(rank), int(size)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("error", module="torch_api")
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
        torch.set_default_device("cuda")
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{file}", rank=rank, world_size=size)
    for case in choose(size):
        if names and case.__name__ not in names:
            continue
        case(rank, size)
        dist.barrier()
        if rank == 0:
            print(f"passed {case.__name__}", flush=True)
    dist.destroy_process_group()
