"""What the GPU's hardware counters say of our row kernels: `python -m benchmarks.counters`, by Nsight Compute (ncu).

The profiler runs this module once more, which launches one step a case between the profiler's marks; kernels are
measured with cold caches, at the clocks that the machine has.
"""

import argparse
import csv
import functools
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import torch_api
from benchmarks.environment import environment
from benchmarks.report import COUNTERS
from benchmarks.shapes import GEMMA, GPT2, LLAMA2, LLAMA3
from benchmarks.timing import train

STALLS = (
    "barrier",
    "lg_throttle",
    "long_scoreboard",
    "math_pipe_throttle",
    "membar",
    "mio_throttle",
    "not_selected",
    "selected",
    "short_scoreboard",
    "wait",
)
METRICS = {
    "ns": "gpu__time_duration.sum",
    "dram_read": "dram__bytes_read.sum",
    "dram_written": "dram__bytes_write.sum",
    "dram_busy": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_sectors": "lts__t_sectors.sum",
    "l2_hits": "lts__t_sector_hit_rate.pct",
    "l2_busy": "lts__t_sectors.avg.pct_of_peak_sustained_elapsed",
    "exponential_unit_busy": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "issue_slots_busy": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "warps_resident": "sm__warps_active.avg.pct_of_peak_sustained_active",
}
# Resident warps by what they wait for.
WARPS = {stall: f"smsp__average_warps_issue_stalled_{stall}_per_issue_active.ratio" for stall in STALLS}
KERNEL = re.compile(r"cross_entropy_\w+_kernel")


def cases() -> dict[str, tuple[int, int, Callable]]:
    """Steps of (logits, labels) by name, with rows and classes."""
    step = functools.partial(train, torch_api.cross_entropy)

    def two_launches(logits, labels):
        loss = torch_api.cross_entropy(logits, labels, reduction="none")
        torch.autograd.grad(loss, logits, torch.rand_like(loss))

    def ignored(logits, labels, run):
        kept = torch.arange(len(labels), device="cuda") // run % 2 == 0
        step(logits, torch.where(kept, labels, -100))

    def soft(logits, labels):
        step(logits, torch.softmax(torch.randn(logits.shape, device="cuda"), -1).to(logits.dtype))

    return {
        "plain, 32000 classes": (8192, LLAMA2, step),
        "plain, 50257 classes": (8192, GPT2, step),
        "plain": (4096, LLAMA3, step),
        "plain, 262144 classes": (2048, GEMMA, step),
        "label smoothing": (4096, LLAMA3, functools.partial(step, label_smoothing=0.1)),
        "soft cap": (4096, LLAMA3, functools.partial(step, softcap=30.0)),
        "soft targets": (4096, LLAMA3, soft),
        "every other row ignored": (4096, LLAMA3, lambda x, y: ignored(x, y, 1)),
        "every other 256 rows ignored": (4096, LLAMA3, lambda x, y: ignored(x, y, 256)),
        "`none`": (4096, LLAMA3, two_launches),
    }


def launch() -> None:
    """Every case once for its compilation, and once between the profiler's marks."""
    for n_rows, n_classes, step in cases().values():
        torch.manual_seed(0)
        logits = (torch.randn(n_rows, n_classes, device="cuda") * 3).bfloat16().requires_grad_() * 1
        labels = torch.randint(0, n_classes, (n_rows,), device="cuda")
        step(logits, labels)
        torch.cuda.synchronize()
        with torch.cuda.profiler.profile():
            step(logits, labels)
            torch.cuda.synchronize()


def parsed(text: str) -> list[dict]:
    """Of every row kernel in ncu's raw page: its name, `METRICS` and `WARPS`, in the order of launches."""
    table = text[text.index('"ID"') :]
    found = []
    for line in csv.DictReader(io.StringIO(table)):
        name = KERNEL.match(line["Kernel Name"])
        if name is not None:
            read = {key: float(line[metric].replace(",", "")) for key, metric in (METRICS | WARPS).items()}
            warps = {stall: read.pop(stall) for stall in WARPS}
            found.append({"kernel": name[0], **read, "warps": warps})
    return found


def of_cases(kernels: list[dict]) -> list[dict]:
    """Kernels with the cases they belong to: `none` takes two launches, every other case one."""
    names = [(name, size[:2]) for name, size in cases().items() for _ in range(2 if name == "`none`" else 1)]
    return [
        {"case": name, "n_rows": n_rows, "n_classes": n_classes, **kernel}
        for (name, (n_rows, n_classes)), kernel in zip(names, kernels, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counters", description=__doc__)
    parser.add_argument("--out", type=Path, default=COUNTERS)
    parser.add_argument("--launch", action="store_true", help="only launch what is to be profiled")
    arguments = parser.parse_args()
    if arguments.launch:
        launch()
        return
    profiler = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--kernel-name", "regex:cross_entropy"]
    profiler += ["--csv", "--page", "raw", "--print-units", "base", "--metrics", ",".join((METRICS | WARPS).values())]
    found = subprocess.run(
        [*profiler, sys.executable, "-m", "benchmarks.counters", "--launch"],
        check=False,
        stdout=subprocess.PIPE,
        text=True,
    )
    if found.returncode or '"ID"' not in found.stdout:
        raise RuntimeError(f"ncu ended with {found.returncode}: {found.stdout[-2000:]}")
    results = {"environment": environment(), "kernels": of_cases(parsed(found.stdout))}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
