"""Host time of a call: `python -m benchmarks.host` on a GPU; without one, with TRITON_INTERPRET=1 and
launches replaced by nothing.

Microseconds from call to return, the device left behind: the median of batches that fit into the launch queue. "bare"
is `kernel[grid](…)` with the arguments that the call passes, in which Triton searches for what it compiled, as our call
does the first time only; without a GPU it is nothing, and the rest is Python's.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from ce_kernels.spec import Reduction
from torch_api import cross_entropy, launch

BATCH, REPEATS = 50, 40


def host_us(function: Callable[[], object]) -> float:
    """The median host time of a call in microseconds."""
    times = []
    for _ in range(REPEATS):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(BATCH):
            function()
        times.append((time.perf_counter() - start) / BATCH * 1e6)
    return statistics.median(times)


def recorded(function: Callable[[], object]) -> list[Callable[[], object]]:
    """The bare launches that a call makes, each with the very arguments it passes."""
    launches, run = [], launch.run_kernel

    def record(name, grid, arguments, options, *remembered):
        kernel = launch.kernel(name)
        launches.append(lambda: kernel[grid](*arguments, **options))
        run(name, grid, arguments, options, *remembered)

    launch.run_kernel = record
    try:
        function()
    finally:
        launch.run_kernel = run
    return launches


def measure(n_rows: int, n_classes: int) -> dict[str, float]:
    """Host microseconds by what is called."""
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    logits = torch.randn(n_rows, n_classes, device=device, dtype=torch.bfloat16)
    labels = torch.randint(0, n_classes, (n_rows,), device=device)
    leaf = logits.clone().requires_grad_()

    def forward(reduction: Reduction = "none"):
        return cross_entropy(logits, labels, reduction=reduction, implementation="triton")

    def train(loss=cross_entropy, **options):
        loss(leaf, labels, **options).backward()
        leaf.grad = None

    calls = {
        "forward none": forward,
        "forward mean": lambda: forward("mean"),
        "forward none, with gradient": lambda: cross_entropy(leaf, labels, reduction="none", implementation="triton"),
        "train mean": lambda: train(implementation="triton"),
        "torch forward mean": lambda: F.cross_entropy(logits, labels),
        "torch train mean": lambda: train(F.cross_entropy),
    }
    results = {}
    for name, call in calls.items():
        call()
        launches = recorded(call) if on_gpu and "torch" not in name else []
        results[name] = host_us(call)
        results[f"{name}: bare"] = sum(host_us(launch) for launch in launches)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: launches are left out, and the label check of CPU tensors")
        launch.run_kernel = lambda *_: None
        from torch_api import arguments

        arguments.check_labels = lambda *_: None
    # Few rows: the queue of launches must not fill up.
    results = measure(64, 1024) if torch.cuda.is_available() else measure(4, 128)
    for name, us in results.items():
        if not name.endswith(": bare"):
            bare = results[f"{name}: bare"]
            print(f"{name:30} {us:7.1f} µs, bare {bare:6.1f} µs, above it {us - bare:6.1f} µs")
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
