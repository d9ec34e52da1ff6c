"""How programs walk their rows, by kernel, shape, dtype and architecture. Each row says what it was measured on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ce_kernels.launch import Problem


@dataclass(frozen=True)
class Config:
    """How a program walks a row: columns of 2-byte elements a step, warps that share them, multiprocessors a program.

    unroll: steps in flight together. backwards: the fused kernel's second pass meets first what the first pass read
    last. max_registers: a thread's, so that more programs share a multiprocessor.
    """

    block: int
    num_warps: int
    num_ctas: int = 1
    num_stages: int = 1
    unroll: int = 1
    backwards: bool = False
    max_registers: int | None = None


# (longest row in bytes, configuration); behind each row the time of a whole training step (FUSED), forward (STATS) or
# `none` step (GRAD, with STATS) as a multiple of copying the logits once. NVIDIA H200, bf16, Triton 3.9, torch 2.11,
# 2026-11-24; `python -m benchmarks tune` measures the kernels alone, on any GPU.
FUSED = (
    (2 * 1024, Config(1024, 1)),  # 65536×1000: 1.42
    (2 * 16384, Config(2048, 8)),  # 16384×8192: 1.15
    (2 * 40000, Config(8192, 16)),  # 8192×32000: 1.21
    (2 * 65536, Config(8192, 16, unroll=2)),  # 8192×50304: 1.19
    # Without clusters; the kernel alone 4096×128256: 1.28, 4096×151936: 1.31, before exponents were taken from x − lse.
    (None, Config(16384, 32, backwards=True, max_registers=32)),
)
# Rows that start between 16-byte boundaries.
FUSED_SHIFTED = (
    *FUSED[:2],
    (2 * 65536, Config(4096, 16, unroll=2)),  # 8192×50257: 1.40
    FUSED[-1],
)
# A row spread over neighbouring multiprocessors: fewer rows in flight, so that the second read finds them in L2.
FUSED_CLUSTERS = (
    (2 * 200000, Config(32768, 8, 8, max_registers=40)),  # 4096×128256: 1.28; 4096×151936: 1.32; 32×128256: 2.58
    (None, Config(65536, 16, 8, backwards=True, max_registers=32)),  # 2048×262144: 1.42
)
STATS = (
    (2 * 1024, Config(1024, 1)),  # 65536×1000: 0.92
    (2 * 16384, Config(1024, 4)),  # 16384×8192: 0.59
    (2 * 40000, Config(8192, 16)),  # 8192×32000: 0.55
    (2 * 65536, Config(2048, 8)),  # 8192×50304: 0.53; 8192×50257: 0.53
    (None, Config(4096, 16)),  # 4096×128256: 0.52; 4096×151936: 0.52; 2048×262144: 0.51
)
STATS_FEW_ROWS = ((None, Config(16384, 8, 8)),)  # 32×128256: 1.45
GRAD = (
    (2 * 1024, Config(1024, 1)),  # 65536×1000: 1.72
    (None, Config(2048, 4)),  # 16384×8192: 1.59; 8192×50257: 1.73; 4096×128256: 1.56; 2048×262144: 1.54
)
# Rows from which clusters are worth their barriers, in bytes; fewer rows than this leave multiprocessors idle.
LONG_ROW, FEW_ROWS = 2 * 65536, 132


def choose(kernel: str, problem: Problem) -> Config:
    """The configuration for a kernel on a problem."""
    row_bytes = problem.row_bytes
    long = problem.clusters and row_bytes > LONG_ROW
    if kernel == "fused":
        table = FUSED_CLUSTERS if long else FUSED_SHIFTED if problem.shifted else FUSED
    elif kernel == "stats":
        table = STATS_FEW_ROWS if long and problem.n_rows <= FEW_ROWS else STATS
    else:
        table = GRAD
    config = next(config for longest, config in table if longest is None or row_bytes <= longest)
    # The same bytes a step for wider elements; no more than the row; 16 bytes a thread at the least.
    block = min(config.block * 2 // problem.itemsize, max(128, 1 << (problem.n_classes - 1).bit_length()))
    warps = max(1, min(config.num_warps, block * problem.itemsize // (32 * 16 * config.num_ctas)))
    return replace(config, block=block, num_warps=warps)
