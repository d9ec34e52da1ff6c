"""Times a training step and a forward pass of every contender that imports, as multiples of copying the logits once."""

import datetime
import importlib
import importlib.metadata
import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F

import torch_api
from benchmarks.shapes import SHAPES, Shape
from benchmarks.timing import cuda_ms, jax_ms, mistake

CHECKED_ROWS = 64


def torch_contenders() -> dict:
    """Loss functions of (logits, labels) by name, as mean over rows."""
    contenders = {
        "ce-kernels torch": torch_api.cross_entropy,
        "torch": F.cross_entropy,
        "torch.compile": torch.compile(F.cross_entropy),
    }
    try:
        liger = importlib.import_module("liger_kernel.transformers.functional")
    except ImportError as error:
        print(f"no Liger: {error}")
    else:
        contenders["Liger"] = liger.liger_cross_entropy
    return contenders


def expected(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The mean loss, and the gradient of the first rows, in fp64."""
    total = sum(
        F.cross_entropy(rows.double(), labels_, reduction="sum").item()
        for rows, labels_ in zip(logits.split(256), labels.split(256), strict=True)
    )
    leaf = logits[:CHECKED_ROWS].double().requires_grad_()
    part = F.cross_entropy(leaf, labels[:CHECKED_ROWS], reduction="sum") / len(labels)
    return total / len(labels), torch.autograd.grad(part, leaf)[0]


def read_ms(logits: torch.Tensor) -> float:
    """Time to read the logits and write almost nothing: the ceiling of a forward pass."""
    from benchmarks.ceiling import read_kernel

    block = 16384
    words = logits.flatten().view(torch.int32)
    out = torch.empty(words.numel() // block, dtype=torch.int32, device="cuda")
    return cuda_ms(lambda: read_kernel[(len(out),)](words, out, BLOCK=block, num_warps=16))  # pyright: ignore


def refused(name: str, loss: torch.Tensor, gradient: torch.Tensor, right: tuple) -> bool:
    """Whether a contender's result is too wrong to be timed; raises if it is ours."""
    # One unit in the last place of bf16; eager PyTorch rounds log-probabilities to bf16, and exponentiates those.
    wrong = mistake(loss, gradient, right, rtol=0.1 if name == "torch" else 2.0**-7)
    if wrong and name.startswith("ce-kernels"):
        raise AssertionError(f"{name}: {wrong}")
    if wrong:
        print(f"{name} is wrong and not timed: {wrong}", flush=True)
    return bool(wrong)


def time_torch(logits: torch.Tensor, labels: torch.Tensor, right: tuple) -> dict:
    """Milliseconds of a training step and of a forward pass by contender."""
    times = {}
    leaf = logits.requires_grad_()
    for name, loss in torch_contenders().items():

        def step(name=name, loss=loss):
            value = loss(leaf * 1 if name == "Liger" else leaf, labels)
            return value, torch.autograd.grad(value, leaf)[0]

        value, gradient = step()
        if refused(name, value, gradient, right):
            continue
        del gradient
        times[name] = {"train": cuda_ms(step)}
        if name == "Liger":
            # It overwrites its input, so it got a copy: that copy is not its own time.
            times[name]["train"] -= cuda_ms(lambda: leaf * 1)
        else:
            with torch.no_grad():
                times[name]["forward"] = cuda_ms(lambda loss=loss: loss(logits, labels))
    return times


def time_jax(logits: torch.Tensor, labels: torch.Tensor, right: tuple) -> dict:
    """Milliseconds of jax.jit(jax.value_and_grad(loss)) by contender; logits are donated, as a model's own are dead."""
    import jax
    import jax.numpy as jnp
    import optax

    import jax_api

    y = jnp.from_dlpack(labels.int())
    x = jnp.from_dlpack(logits.detach())

    def optax_mean(x, y):
        return optax.softmax_cross_entropy_with_integer_labels(x.astype(jnp.float32), y).mean()

    times = {}
    for name, loss in {"ce-kernels JAX": jax_api.cross_entropy, "Optax": optax_mean}.items():
        step = jax.jit(jax.value_and_grad(loss), donate_argnums=0)
        value, gradient = step(x + 0, y)
        if refused(name, torch.from_dlpack(value), torch.from_dlpack(gradient), right):
            continue
        del gradient
        times[name] = {"train": jax_ms(lambda x, step=step: step(x, y)[0], [x + 0 for _ in range(9)])}
        forward = jax.jit(loss)
        times[name]["forward"] = jax_ms(lambda x, forward=forward: forward(x, y), [x] * 9)
    return times


def run_shape(shape: Shape) -> dict:
    """One shape: every contender checked, then timed."""
    torch.manual_seed(0)
    logits = torch.randn(shape.n_rows, shape.n_classes, device="cuda", dtype=torch.bfloat16) * 3
    labels = torch.randint(0, shape.n_classes, (shape.n_rows,), device="cuda")
    right = expected(logits, labels)
    into = torch.empty_like(logits)
    copy = cuda_ms(lambda: into.copy_(logits))
    result = {**shape._asdict(), "copy_ms": copy, "read_ms": read_ms(logits)}
    times = time_torch(logits, labels, right)
    logits.requires_grad_(False)
    torch.cuda.empty_cache()
    times |= time_jax(logits, labels, right)
    for name, timed in times.items():
        result[name] = {f"{kind}_ms": ms for kind, ms in timed.items()}
        shown = ", ".join(f"{kind} {ms / copy:.3f}" for kind, ms in timed.items())
        print(f"{shape.name:14} {name:18} {shown} × copy", flush=True)
    return result


def environment() -> dict:
    """What the figures were measured on."""
    packages = ("torch", "triton", "jax", "jax-triton", "optax", "liger-kernel")
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        commit = commit.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "gpu": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "versions": found,
        "date": datetime.date.today().isoformat(),
        "commit": commit,
    }


def run(out: Path) -> None:
    """Runs every shape and writes the results as JSON."""
    results = {"environment": environment(), "shapes": [run_shape(shape) for shape in SHAPES]}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {out}")
