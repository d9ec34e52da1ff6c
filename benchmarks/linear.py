"""Times the whole head, hidden states to gradients, against its three matmuls alone: `python -m benchmarks.linear`.

Every contender's loss and gradients are checked before it is timed. Its time is taken in turns with the matmuls', so
that the ratio is of one moment of the GPU; its memory is the peak beyond inputs and gradients.
"""

import argparse
import functools
import importlib
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# JAX would take three quarters of the memory at its first use.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import torch
import torch.nn.functional as F
from torch import Tensor

import torch_api
from benchmarks.environment import environment
from benchmarks.report import LINEAR, linear_section
from benchmarks.shapes import GEMMA, LLAMA3, QWEN

GIB = 2**30
CHECKED = 64
REPEATS, STEPS = 3, 3


class Head(NamedTuple):
    """N rows of D features and V classes, bf16."""

    name: str
    n_rows: int
    width: int
    n_classes: int


HEADS = (
    Head("Llama 3 8B", 8192, 4096, LLAMA3),
    Head("Qwen 2.5 3B", 16384, 2048, QWEN),
    Head("Gemma 3 4B", 32768, 2560, GEMMA),
)


class Arrays(NamedTuple):
    """The problem, and of its right result the loss, dhidden of the first rows, dweight of the first classes."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    loss: float
    dhidden: Tensor
    dweight: Tensor


def make(head: Head) -> Arrays:
    """Logits of standard deviation 3; the right result in fp32 matmuls and fp64 sums, in blocks of rows."""
    torch.manual_seed(0)
    hidden = torch.randn(head.n_rows, head.width, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(head.n_classes, head.width, device="cuda") * (3 / head.width**0.5)
    weight = weight.bfloat16()
    labels = torch.randint(0, head.n_classes, (head.n_rows,), device="cuda")
    labels[::3] %= CHECKED  # so that the classes that are checked are labels too
    wide = weight.float()
    loss, dhidden = 0.0, torch.empty(0)
    dweight = torch.zeros(CHECKED, head.width, device="cuda", dtype=torch.float64)
    for start in range(0, head.n_rows, 512):
        part = slice(start, start + 512)
        logits = hidden[part].float() @ wide.T
        loss += F.cross_entropy(logits, labels[part], reduction="sum").double().item()
        dlogits = logits.softmax(-1)
        dlogits[torch.arange(len(dlogits)), labels[part]] -= 1
        dlogits /= head.n_rows
        dweight += dlogits[:, :CHECKED].T.double() @ hidden[part].double()
        if start == 0:
            dhidden = dlogits[:CHECKED] @ wide
    return Arrays(hidden.requires_grad_(), weight.requires_grad_(), labels, loss / head.n_rows, dhidden, dweight)


def errors(arrays: Arrays, loss: Tensor, dhidden: Tensor, dweight: Tensor) -> dict[str, float]:
    """Relative errors of the loss, and of the checked gradients by norm."""

    def of(found: Tensor, right: Tensor) -> float:
        return ((found.double() - right.double()).norm() / right.double().norm()).item()

    return {
        "loss": abs(loss.item() - arrays.loss) / abs(arrays.loss),
        "dhidden": of(dhidden[:CHECKED], arrays.dhidden),
        "dweight": of(dweight[:CHECKED], arrays.dweight),
    }


def torch_contenders() -> dict[str, Callable]:
    """Mean losses of (hidden, weight, labels) by name: those that import."""

    def unfused(hidden, weight, labels):
        return F.cross_entropy(F.linear(hidden, weight), labels)

    ours = torch_api.linear_cross_entropy
    contenders = {
        "ce-kernels torch": ours,
        "ce-kernels torch, parameter": functools.partial(ours, accumulation="parameter"),
        "ce-kernels torch, parameter, 200 MiB": functools.partial(
            ours, accumulation="parameter", max_logits_bytes=200 * 2**20
        ),
        "torch": unfused,
        "torch.compile": torch.compile(unfused),
    }
    peers = {
        "Liger": ("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"),
        "Apple CCE": ("cut_cross_entropy", "linear_cross_entropy"),
        "quack": ("quack.linear_cross_entropy", "chunked_linear_cross_entropy"),
    }
    for name, (module, function) in peers.items():
        try:
            contenders[name] = getattr(importlib.import_module(module), function)
        except Exception as error:
            print(f"no {name}: {error}")
    chunked = getattr(F, "linear_cross_entropy", None)
    if chunked is None:
        print(f"no torch.nn.functional.linear_cross_entropy in torch {torch.__version__}")
    else:
        options = torch.nn.LinearCrossEntropyOptions()  # pyright: ignore
        contenders["torch linear_cross_entropy"] = functools.partial(chunked, options=options)
    return contenders


def bare_matmuls(arrays: Arrays) -> Callable[[], None]:
    """The floor: logits, dhidden and dweight as three matmuls over all rows, in buffers made beforehand."""
    hidden, weight = arrays.hidden.detach(), arrays.weight.detach()
    logits = torch.empty(len(hidden), len(weight), device="cuda", dtype=torch.bfloat16)
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=dhidden)
        torch.mm(logits.T, hidden, out=dweight)

    return run


def elapsed_ms(step: Callable[[], object]) -> float:
    """Device time of one step by events: the mean of STEPS after another; the device sleeps, so the host is ahead."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    step()
    torch.cuda._sleep(2_000_000)
    start.record()
    for _ in range(STEPS):
        step()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / STEPS


def in_turns(function: Callable[[], float], floor: Callable[[], float]) -> dict[str, float]:
    """Medians of both times, and of their ratio turn by turn. Both must take as many steps: clocks sink under load."""
    function()
    floor()
    pairs = [(function(), floor()) for _ in range(REPEATS)]
    return {
        "ms": statistics.median(ms for ms, _ in pairs),
        "floor_ms": statistics.median(ms for _, ms in pairs),
        "ratio": statistics.median(ms / floor_ms for ms, floor_ms in pairs),
    }


def measure_torch(arrays: Arrays, loss: Callable, floor: Callable[[], float]) -> dict:
    """Errors, memory and time of one contender."""
    inputs = (arrays.hidden, arrays.weight)

    def step():
        value = loss(*inputs, arrays.labels)
        value = value[0] if isinstance(value, tuple) else value
        return value, *torch.autograd.grad(value, inputs)

    result: dict = {"errors": errors(arrays, *step())}
    step()  # compiled by now, and cuBLAS has its workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    gradients = sum(x.numel() * x.element_size() for x in inputs)
    result["memory_gib"] = (torch.cuda.max_memory_allocated() - before - gradients) / GIB
    return result | in_turns(lambda: elapsed_ms(step), floor)


def jax_contenders() -> dict[str, Callable]:
    """Mean losses of (hidden, weight [V, D], labels) by name."""
    import jax.numpy as jnp
    import optax

    import jax_api

    def plain(hidden, weight, labels):
        logits = (hidden @ weight.T).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    ours = functools.partial(jax_api.linear_cross_entropy, class_axis=0)
    contenders = {
        "ce-kernels JAX": ours,
        "ce-kernels JAX, parameter": functools.partial(ours, accumulation="parameter"),
        "XLA": plain,
    }
    try:
        tokamax = importlib.import_module("tokamax")
    except ImportError as error:
        print(f"no tokamax: {error}")
    else:
        contenders["tokamax on XLA"] = lambda hidden, weight, labels: tokamax.linear_softmax_cross_entropy_loss(
            hidden, labels, weight.T, reduction="mean", implementation="xla"
        )
    return contenders


def measure_jax(arrays: Arrays, loss: Callable, floor: Callable[[], float]) -> dict:
    """As measure_torch; memory is what XLA plans for temporaries, time that of the host, which waits once in STEPS."""
    import time

    import jax
    import jax.numpy as jnp

    inputs = [jnp.from_dlpack(x) for x in (arrays.hidden.detach(), arrays.weight.detach(), arrays.labels.int())]
    step = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*inputs).compile()
    value, gradients = step(*inputs)
    result: dict = {"errors": errors(arrays, *(torch.from_dlpack(x) for x in (value, *gradients)))}
    del value, gradients
    memory = step.memory_analysis()
    assert memory is not None
    result["memory_gib"] = memory.temp_size_in_bytes / GIB

    def call_ms() -> float:
        jax.block_until_ready(step(*inputs))
        start = time.perf_counter()
        for _ in range(STEPS):
            out = step(*inputs)
        jax.block_until_ready(out)  # pyright: ignore[reportPossiblyUnbound]
        return (time.perf_counter() - start) / STEPS * 1e3

    return result | in_turns(call_ms, floor)


def run_head(head: Head, only: str) -> dict:
    """Every contender whose name holds `only`, checked, then timed."""
    arrays = make(head)
    floor_call = bare_matmuls(arrays)
    result: dict = {**head._asdict(), "contenders": {}}
    plans = [(name, loss, measure_torch) for name, loss in torch_contenders().items()]
    plans += [(name, loss, measure_jax) for name, loss in jax_contenders().items()]
    for name, loss, measure in plans:
        if only not in name:
            continue
        try:
            found = measure(arrays, loss, lambda: elapsed_ms(floor_call))
        except Exception as error:
            if name.startswith("ce-kernels"):
                raise
            print(f"{head.name}: {name} is not timed: {type(error).__name__}: {str(error)[:200]}", flush=True)
            continue
        finally:
            torch.cuda.empty_cache()
        # Some round their loss to bf16.
        wrong = found["errors"]["loss"] > 2**-7 or max(found["errors"]["dhidden"], found["errors"]["dweight"]) > 0.03
        if wrong and name.startswith("ce-kernels"):
            raise AssertionError(f"{name}: {found['errors']}")
        if wrong:
            print(f"{head.name}: {name} is wrong and not listed: {found['errors']}", flush=True)
            continue
        result["contenders"][name] = found
        shown = ", ".join(f"{key} {value:.1e}" for key, value in found["errors"].items())
        print(
            f"{head.name:12} {name:36} {found['ms']:8.2f} ms  {found['ratio']:.3f} × matmuls  "
            f"{found['memory_gib']:6.2f} GiB  errors: {shown}",
            flush=True,
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear", description=__doc__)
    parser.add_argument("--out", type=Path, default=LINEAR)
    parser.add_argument("--heads", type=int, nargs="*", default=range(len(HEADS)), help="indices of the heads to run")
    parser.add_argument("--only", default="", help="contenders whose name holds this")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    results: dict = {"environment": environment(), "heads": []}
    for i in arguments.heads:
        results["heads"].append(run_head(HEADS[i], arguments.only))
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(linear_section(results))


if __name__ == "__main__":
    main()
