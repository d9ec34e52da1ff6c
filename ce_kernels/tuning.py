"""Block sizes and warps, chosen by kernel, row length and element size. Each row says what it was measured on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """How one program walks a row: columns of 2-byte elements a step, warps that share them, pipelining stages."""

    block: int
    num_warps: int
    num_stages: int = 1


# (longest row, configuration); the time behind each row is a multiple of copying the logits once.
# NVIDIA H200, bf16, Triton 3.9, torch 2.11, 2026-11-24.
FUSED = (
    (1024, Config(1024, 4)),  # 65536×1000: 1.53
    (16384, Config(2048, 4)),  # 16384×8192: 1.05
    (65536, Config(8192, 16)),  # 8192×32000: 1.21
    (None, Config(16384, 32)),  # 4096×128256: 1.44; 2048×262144: 1.52
)
STATS = (
    (1024, Config(1024, 4)),  # 65536×1000: 0.99
    (16384, Config(2048, 4)),  # 16384×8192: 0.50
    (65536, Config(8192, 8)),  # 8192×32000: 0.51
    (None, Config(8192, 16)),  # 4096×128256: 0.51; 2048×262144: 0.50
)
TABLES = {"fused": FUSED, "stats": STATS, "grad": STATS}


def choose(kernel: str, n_classes: int, itemsize: int) -> Config:
    """The configuration for a kernel on rows of n_classes elements of itemsize bytes."""
    config = next(config for longest, config in TABLES[kernel] if longest is None or n_classes <= longest)
    # The same bytes a step for wider elements; no more than the row; 16 bytes a thread at the least.
    block = min(config.block * 2 // itemsize, max(128, 1 << (n_classes - 1).bit_length()))
    warps = max(1, min(config.num_warps, block * itemsize // (32 * 16)))
    return Config(block, warps, config.num_stages)
