"""Do gradient matmuls that skip probabilities below rounding get faster? `python -m benchmarks.sparse_gradient`.

A head as peaked as a trained one: class frequencies fall as 1 / rank, and weights are sharpened until the softmax has
the entropy of a language model, with labels drawn from it. A block of 128 rows × 128 classes of dlogits counts where
one of its |p − q| reaches the threshold; both gradient matmuls visit only blocks that count. Classes stand in the
order of the vocabulary, which is random here, and in the order of their mean probability.
"""

import argparse
import json
import os
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.report import SPARSE_GRADIENT
from benchmarks.timing import cuda_ms

BLOCK = 128
THRESHOLDS = (0.0, 2.0**-20, 2.0**-16, 2.0**-12, 2.0**-9)


@triton.jit
def _block_sparse_matmul(
    a_ptr,
    b_ptr,
    blocks_ptr,
    counts_ptr,
    out_ptr,
    n_columns,
    A_ROW: tl.constexpr,
    A_INNER: tl.constexpr,
    N_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of out = a @ b: BLOCK rows of a, whose inner blocks `blocks` count, and COLUMNS columns of b."""
    row, column = tl.program_id(1), tl.program_id(0)
    rows = (row * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    columns = column * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for i in tl.range(0, tl.load(counts_ptr + row)):  # pyright: ignore[reportGeneralTypeIssues]
        inner = (tl.load(blocks_ptr + row * N_BLOCKS + i) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        a = tl.load(a_ptr + rows[:, None] * A_ROW + inner[None, :] * A_INNER)
        b = tl.load(b_ptr + inner[:, None] * n_columns + columns[None, :])
        total = tl.dot(a, b, total)
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * n_columns + columns[None, :], out)


def block_sparse_matmul(a: Tensor, b: Tensor, counted: Tensor) -> Tensor:
    """a @ b over the blocks of a that count: counted [rows of a / BLOCK, columns of a / BLOCK] bool."""
    blocks = counted.to(torch.int8).argsort(dim=1, descending=True, stable=True).int()
    counts = counted.sum(1, dtype=torch.int32)
    out = torch.empty(len(a), b.shape[1], device=a.device, dtype=b.dtype)
    columns = min(256, b.shape[1])
    grid = (b.shape[1] // columns, len(a) // BLOCK)
    _block_sparse_matmul[grid](
        a,
        b,
        blocks,
        counts,
        out,
        b.shape[1],
        A_ROW=a.stride(0),
        A_INNER=a.stride(1),
        N_BLOCKS=counted.shape[1],
        BLOCK=BLOCK,
        COLUMNS=columns,
        num_warps=8,  # pyright: ignore[reportCallIssue]
        num_stages=3,  # pyright: ignore[reportCallIssue]
    )
    return out


def peaked_head(n_rows: int, width: int, n_classes: int, entropy: float, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and dlogits of Σ loss, in bf16, with the softmax's mean entropy in nats as asked for."""
    # Triton's interpreter has no bf16 arithmetic.
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    hidden = torch.randn(n_rows, width, device=device)
    hidden[:, 0] = 1.0
    weight = torch.randn(n_classes, width, device=device) / width**0.5
    rank = torch.randperm(n_classes, device=device) + 1.0
    low, high = 0.0, 16.0
    for _ in range(12):
        sharpness = (low + high) / 2
        scaled = weight * sharpness
        scaled[:, 0] = -rank.log()
        p = (hidden[:512] @ scaled.T).softmax(-1)
        found = -(p * p.clamp_min(1e-30).log()).sum(-1).mean().item()
        low, high = (sharpness, high) if found > entropy else (low, sharpness)
    hidden, weight = hidden.to(dtype), scaled.to(dtype)  # pyright: ignore[reportPossiblyUnbound]
    dlogits = torch.empty(n_rows, n_classes, device=device, dtype=dtype)
    for part in range(0, n_rows, 512):
        p = (hidden[part : part + 512] @ weight.T).float().softmax(-1)
        labels = p.multinomial(1)
        dlogits[part : part + 512] = p.scatter_add_(1, labels, torch.full_like(p[:, :1], -1.0))
    return hidden, weight, dlogits


def blocks_that_count(dlogits: Tensor, threshold: float) -> Tensor:
    """[rows / BLOCK, classes / BLOCK] bool."""
    n_rows, n_classes = dlogits.shape
    largest = dlogits.view(n_rows // BLOCK, BLOCK, n_classes // BLOCK, BLOCK).abs().amax((1, 3))
    return largest >= threshold


def error(found: Tensor, right: Tensor) -> float:
    """Relative, by norm."""
    return ((found.double() - right.double()).norm() / right.double().norm()).item()


def measure(hidden: Tensor, weight: Tensor, dlogits: Tensor, order: str, timed: bool) -> list[dict]:
    """Kept blocks, times and errors at every threshold, and of the two dense matmuls."""

    def ms(function) -> float:
        return cuda_ms(function, repeats=7) if timed else 0.0

    # Sums of the same products in fp32.
    right = dlogits.float() @ weight.float(), dlogits.T.float() @ hidden.float()
    dense = dlogits @ weight, dlogits.T @ hidden
    rows = [
        {
            "order": order,
            "threshold": "cuBLAS",
            "kept": 1.0,
            "blocks_ms": 0.0,
            "dhidden_ms": ms(lambda: dlogits @ weight),
            "dweight_ms": ms(lambda: dlogits.T @ hidden),
            "dhidden_error": error(dense[0], right[0]),
            "dweight_error": error(dense[1], right[1]),
        }
    ]
    for threshold in THRESHOLDS:
        counted = blocks_that_count(dlogits, threshold)
        transposed = counted.T.contiguous()
        rows.append(
            {
                "order": order,
                "threshold": threshold,
                "kept": counted.float().mean().item(),
                "blocks_ms": ms(lambda threshold=threshold: blocks_that_count(dlogits, threshold)),
                "dhidden_ms": ms(lambda counted=counted: block_sparse_matmul(dlogits, weight, counted)),
                "dweight_ms": ms(lambda counted=transposed: block_sparse_matmul(dlogits.T, hidden, counted)),
                "dhidden_error": error(block_sparse_matmul(dlogits, weight, counted), right[0]),
                "dweight_error": error(block_sparse_matmul(dlogits.T, hidden, transposed), right[1]),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse_gradient", description=__doc__)
    parser.add_argument("--out", type=Path, default=SPARSE_GRADIENT)
    parser.add_argument("--entropy", type=float, default=2.0, help="nats; a language model's is 1.5 to 3")
    parser.add_argument("--shape", type=int, nargs=3, default=(2048, 4096, 128256 // BLOCK * BLOCK))
    options = parser.parse_args()
    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    n_rows, width, n_classes = options.shape
    hidden, weight, dlogits = peaked_head(n_rows, width, n_classes, options.entropy, device)
    timed = device == "cuda"
    results = measure(hidden, weight, dlogits, "vocabulary", timed)
    order = dlogits.float().abs().mean(0).argsort(descending=True)
    results += measure(hidden, weight[order], dlogits[:, order], "mean probability", timed)
    print("order             threshold   kept   blocks  dhidden  dweight [ms]   errors dhidden, dweight")
    for row in results:
        threshold = row["threshold"] if isinstance(row["threshold"], str) else f"{row['threshold']:.1e}"
        times = "  ".join(f"{row[name]:7.3f}" for name in ("blocks_ms", "dhidden_ms", "dweight_ms"))
        errors = ", ".join(f"{row[name]:.1e}" for name in ("dhidden_error", "dweight_error"))
        print(f"{row['order']:16}  {threshold:>9}  {row['kept']:5.1%}  {times}       {errors}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    written = {"environment": environment(), "shape": options.shape, "entropy": options.entropy, "rows": results}
    options.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
