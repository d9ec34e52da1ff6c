"""How the cost of our training step grows: with rows, with the vocabulary, with the dtype."""

import torch

import torch_api
from benchmarks.shapes import LLAMA3
from benchmarks.timing import forward, interleaved, ours_is_right, read, right_rows, wrong_gradient

ROWS = tuple(4**k for k in range(9))  # 1 to 65536; the last is 8·10⁹ elements, beyond 32-bit offsets
ELEMENTS = 2**28
VOCABULARIES = tuple(2**k for k in range(4, 21))


def measure(n_rows: int, n_classes: int, dtype: torch.dtype) -> dict:
    """A training step and a forward pass beside a copy of their logits and a read of them."""
    logits = torch.empty(n_rows, n_classes, device="cuda", dtype=dtype).normal_().requires_grad_() * 1
    labels = torch.randint(0, n_classes, (n_rows,), device="cuda")
    into = torch.empty_like(logits)

    def step(_):
        value = torch_api.cross_entropy(logits, labels)
        return torch.autograd.grad(value, logits)[0]

    right = right_rows(logits, labels) / n_rows
    ours_is_right(f"{n_rows}×{n_classes} {dtype}", wrong_gradient(step(0), right))
    functions = {
        "train": step,
        "forward": lambda _: forward(torch_api.cross_entropy, logits, labels),
        "copy": lambda _: into.copy_(logits.detach()),
        "read": lambda _: read(logits),
    }
    times = interleaved(functions, repeats=7)
    shape = {"n_rows": n_rows, "n_classes": n_classes, "dtype": str(dtype).removeprefix("torch.")}
    return shape | {f"{name}_ms": timing["ms"] for name, timing in times.items()}


def growth() -> dict:
    """Rows at one vocabulary, vocabularies at one size, dtypes at one shape."""
    bf16 = torch.bfloat16
    result = {
        "rows": [measure(n_rows, LLAMA3, bf16) for n_rows in ROWS],
        "vocabularies": [measure(ELEMENTS // n, n, bf16) for n in VOCABULARIES],
        "dtypes": [measure(4096, LLAMA3, dtype) for dtype in (bf16, torch.float16, torch.float32)],
    }
    torch.cuda.empty_cache()
    for kind, points in result.items():
        shown = ", ".join(
            f"{p['n_rows']}×{p['n_classes']} {p['dtype']} {p['train_ms'] / p['copy_ms']:.2f}" for p in points
        )
        print(f"{kind}: {shown}", flush=True)
    return result
