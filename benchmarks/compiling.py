"""What compiles when, and for how long: `python -m benchmarks.compiling` on a GPU.

Eager calls compile Triton kernels; calls under torch.compile also graphs. Each of the two ways is followed in a process
of its own, which has compiled nothing yet, over caches on disk that are empty.
"""

import contextlib
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import torch
from torch._dynamo.utils import counters
from triton import knobs

from benchmarks.environment import environment
from benchmarks.shapes import LLAMA3
from benchmarks.timing import train
from torch_api import cross_entropy

BATCHES = (1024, 1536, 2048, 4096)  # rows; the first call sees the first of them
# A value that turns the option on, and another.
OPTIONS = {
    "label_smoothing": (0.1, 0.2),
    "z_loss": (1e-4, 2e-4),
    "softcap": (30.0, 20.0),
    "logit_scale": (0.5, 0.25),
    "ignore_index": (-1, 0),
}


@contextlib.contextmanager
def cold_caches() -> Iterator[None]:
    """Triton and Inductor, here and in processes started here, find nothing on disk that was compiled before."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        places = {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        with mock.patch.dict(os.environ, places):
            yield


def compiled(backend: str = "inductor") -> Callable:
    """Our loss under torch.compile, which raises where one graph is not enough."""
    return torch.compile(cross_entropy, fullgraph=True, backend=backend)


def follow(loss: Callable, device: str, batches: tuple[int, ...], n_classes: int) -> dict:
    """Seconds of training steps, and how many graphs and which of our kernels they compile.

    The first step of all, those of other batch sizes, and for every option that of a second value.
    """
    kernels: list[str] = []

    def step(n_rows: int, **options) -> dict:
        logits = torch.randn(n_rows, n_classes, device=device, dtype=torch.bfloat16).requires_grad_() * 1
        labels = torch.randint(0, n_classes, (n_rows,), device=device)
        graphs_before, kernels_before = counters["stats"]["unique_graphs"], len(kernels)
        started = time.perf_counter()
        _, gradient = train(loss, logits, labels, **options)
        gradient[0, 0].item()  # waits for the device
        return {
            "seconds": time.perf_counter() - started,
            "graphs": counters["stats"]["unique_graphs"] - graphs_before,
            "kernels": kernels[kernels_before:],
        }

    def changed(option: str) -> dict:
        torch.compiler.reset()  # graphs of other options do not count
        on, other = OPTIONS[option]
        step(batches[0], **{option: on})
        return step(batches[0], **{option: other})

    with knobs.runtime.scope():
        knobs.runtime.jit_post_compile_hook = lambda *, fn, **_: kernels.append(fn.name)
        return {
            "first_call": step(batches[0]),
            "batch_sizes": {str(n_rows): step(n_rows) for n_rows in batches[1:]},
            "options": {option: changed(option) for option in OPTIONS},
        }


def follow_eager() -> dict:
    """On a GPU, at Llama 3's vocabulary."""
    return follow(cross_entropy, "cuda", BATCHES, LLAMA3)


def follow_compiled() -> dict:
    """On a GPU, at Llama 3's vocabulary."""
    return follow(compiled(), "cuda", BATCHES, LLAMA3)


def compiling() -> dict:
    """What compiles when, by the way of calling."""
    result: dict = {"n_classes": LLAMA3, "first_rows": BATCHES[0]}
    for way, function in (("eager", follow_eager), ("torch.compile", follow_compiled)):
        with cold_caches(), ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            result[way] = pool.submit(function).result()
    return result


if __name__ == "__main__":
    print(json.dumps({"environment": environment(), **compiling()}, indent=1))
