"""Block sizes and warps, chosen by kernel, row length and element size. Each row says what it was measured on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """How one program walks a row: columns a step, warps that share them, software pipelining stages."""

    block: int
    num_warps: int
    num_stages: int = 1


def choose(kernel: str, n_classes: int, itemsize: int) -> Config:
    """The configuration for a kernel on rows of n_classes elements of itemsize bytes."""
    if kernel == "fused":
        # One program a multiprocessor at 128k and more keeps the rows in flight inside L2 for the second read.
        largest = Config(32768, 32) if n_classes > 65536 else Config(8192, 16)
    else:
        largest = Config(8192, 16)
    block = min(largest.block * 2 // max(itemsize, 2), max(128, 1 << (n_classes - 1).bit_length()))
    # 8 elements of bf16 a thread and step at the least: one 16-byte load.
    warps = max(1, min(largest.num_warps, block * itemsize // (32 * 16)))
    return Config(block, warps, largest.num_stages)
