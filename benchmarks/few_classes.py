"""Rows of few classes, and classes in front of other dimensions: where a program a row would be slow."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.contenders import torch_contenders
from benchmarks.names import OURS_TORCH
from benchmarks.timing import interleaved, refused, right_rows, train

CONTENDERS = (OURS_TORCH, "torch", "torch.compile")


class Shape(NamedTuple):
    """Logits (N, C, d1, …) of a dtype."""

    name: str
    size: tuple[int, ...]
    dtype: str


SHAPES = (
    Shape("token classes", (2**20, 64), "bfloat16"),
    Shape("token classes, odd", (2**20, 51), "bfloat16"),
    Shape("segmentation", (16, 21, 512, 512), "float32"),
    Shape("segmentation, bf16", (16, 21, 512, 512), "bfloat16"),
    Shape("codebook", (8, 1024, 64, 64), "bfloat16"),
)


def run_shape(shape: Shape) -> dict:
    """Training step and forward pass of every contender whose result is right, beside a copy of the logits."""
    torch.manual_seed(0)
    logits = (torch.randn(shape.size, device="cuda") * 3).to(getattr(torch, shape.dtype)).requires_grad_() * 1
    labels = torch.randint(0, shape.size[1], (shape.size[0], *shape.size[2:]), device="cuda")
    parts = zip(logits.detach().chunk(16), labels.chunk(16), strict=True)
    loss = sum(F.cross_entropy(part.double(), y, reduction="sum").item() for part, y in parts)
    right = (loss / labels.numel(), right_rows(logits, labels, rows=1) / labels.numel())
    into = torch.empty_like(logits)
    functions: dict[tuple[str, str], Callable[[int], object]] = {
        ("copy", "train"): lambda _: into.copy_(logits.detach())
    }
    for name, contender in torch_contenders().items():
        if name not in CONTENDERS or refused(name, *train(contender, logits, labels), right):
            continue
        functions[name, "train"] = lambda _, contender=contender: train(contender, logits, labels)
        if not refused(name, contender(logits.detach(), labels), None, right):
            functions[name, "forward"] = lambda _, contender=contender: contender(logits.detach(), labels)
    times = interleaved(functions, repeats=7)
    found: dict = {"copy_ms": times.pop(("copy", "train"))["ms"]}
    for (name, kind), timing in times.items():
        found.setdefault(name, {})[kind] = timing
    shown = {f"{name} {kind}": round(timing["ms"] / found["copy_ms"], 2) for (name, kind), timing in times.items()}
    print(shape.name, shape.size, shown, flush=True)
    return shape._asdict() | found


def few_classes() -> list[dict]:
    """Every shape."""
    return [run_shape(shape) for shape in SHAPES]
