"""Times every contender at every shape, our options at one, and how our cost grows; writes one JSON file."""

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import torch_api
from benchmarks.compiling import cold_caches, compiled, compiling
from benchmarks.contenders import jax_contenders, torch_contenders
from benchmarks.environment import environment
from benchmarks.few_classes import few_classes
from benchmarks.growth import growth
from benchmarks.host import measure
from benchmarks.memory_jax import temporary_bytes
from benchmarks.names import BYTES, OURS_TORCH, OVERWRITES
from benchmarks.shapes import LLAMA3, SHAPES, Shape
from benchmarks.timing import (
    ROTATED_BYTES,
    copy_kept,
    forward,
    interleaved,
    jax_ms,
    ours_is_right,
    peak_bytes,
    read,
    refused,
    right_rows,
    train,
    wrong_gradient,
)


def problem(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Enough copies of the logits, as results of an operation, to outgrow the caches; and labels."""
    torch.manual_seed(0)
    logits = (torch.randn(shape.n_rows, shape.n_classes, device="cuda") * 3).to(dtype)
    copies = max(1, ROTATED_BYTES // logits.nbytes)
    labels = torch.randint(0, shape.n_classes, (shape.n_rows,), device="cuda")
    return [logits.clone().requires_grad_() * 1 for _ in range(copies)], labels


def expected(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The mean loss, and the gradient of the first rows, in fp64."""
    parts = zip(logits.detach().split(256), labels.split(256), strict=True)
    total = sum(F.cross_entropy(rows.double(), classes, reduction="sum").item() for rows, classes in parts)
    return total / len(labels), right_rows(logits, labels) / len(labels)


def donated_peak_bytes(logits: torch.Tensor, labels: torch.Tensor, right: tuple) -> int:
    """Peak memory beyond the logits of our training step whose gradient overwrites them: each call gets its own."""
    own = [logits * 1 for _ in range(3)]

    def step():
        return train(torch_api.cross_entropy, own.pop(), labels, donate_logits=True)

    refused(OURS_TORCH, *step(), right)
    return peak_bytes(step)


def time_torch(buffers: list[torch.Tensor], labels: torch.Tensor, right: tuple) -> dict:
    """Training step and forward pass by contender; copying the logits once, and reading them."""
    into = torch.empty_like(buffers[0])
    functions: dict[tuple[str, str], Callable[[int], object]] = {
        ("copy", ""): lambda turn: into.copy_(buffers[turn % len(buffers)].detach()),
        ("read", ""): lambda turn: read(buffers[turn % len(buffers)]),
    }
    result: dict = {}
    for name, loss in torch_contenders().items():

        def own(turn, name=name):
            logits = buffers[turn % len(buffers)]
            return logits * 1 if name in OVERWRITES else logits

        started = time.perf_counter()
        value, gradient = train(loss, own(0), labels)
        torch.cuda.synchronize()
        first_call = time.perf_counter() - started
        if refused(name, value, gradient, right):
            continue
        del gradient
        result[name] = {"first_call_s": first_call}
        if name == OURS_TORCH:
            result[name]["donated_peak_bytes"] = donated_peak_bytes(buffers[0], labels, right)
        if name not in OVERWRITES:
            result[name]["peak_bytes"] = peak_bytes(lambda loss=loss: train(loss, buffers[0], labels))
            if not refused(name, forward(loss, buffers[0], labels), None, right):
                functions[name, "forward"] = lambda turn, loss=loss: forward(loss, buffers[turn % len(buffers)], labels)
        functions[name, "train"] = lambda turn, loss=loss, own=own: train(loss, own(turn), labels)
    upstream = torch.randn(len(labels), device="cuda")

    def rows(turn):
        logits = buffers[turn % len(buffers)]
        return torch.autograd.grad(torch_api.cross_entropy(logits, labels, reduction="none"), logits, upstream)

    wanted = right[1] * len(labels) * upstream[: len(right[1]), None]
    ours_is_right("none", wrong_gradient(rows(0)[0], wanted))
    functions[OURS_TORCH, "none"] = rows
    if any(name in result for name in OVERWRITES):
        functions["own copy", ""] = lambda turn: buffers[turn % len(buffers)] * 1
    times = interleaved(functions)
    for (name, kind), timing in times.items():
        if not kind:
            result[f"{name.replace(' ', '_')}_ms"] = timing["ms"]
        else:
            if name in OVERWRITES:
                timing = {key: ms - times["own copy", ""]["ms"] for key, ms in timing.items()}
            result[name][kind] = timing
    return result


def time_jax(logits: torch.Tensor, labels: torch.Tensor, right: tuple, repeats: int = 7) -> dict:
    """jax.jit(jax.value_and_grad(loss)) and the forward by contender; logits donated, as a model's own are dead."""
    import jax
    import jax.numpy as jnp

    y, x = jnp.from_dlpack(labels.int()), jnp.from_dlpack(logits.detach())
    result = {}
    for name, loss in jax_contenders().items():
        step = jax.jit(jax.value_and_grad(loss), donate_argnums=0)
        started = time.perf_counter()
        compiled = step.lower(x, y).compile()
        first_call = time.perf_counter() - started
        value, gradient = compiled(x + 0, y)
        if refused(name, torch.from_dlpack(value), torch.from_dlpack(gradient), right):
            continue
        del gradient
        memory = compiled.memory_analysis()
        assert memory is not None
        evaluate = jax.jit(loss)
        result[name] = {
            "first_call_s": first_call,
            "temporary_bytes": int(memory.temp_size_in_bytes),
            "train": jax_ms(lambda x, step=compiled: step(x, y)[0], [x + 0 for _ in range(repeats + 1)]),
        }
        if not refused(name, torch.from_dlpack(evaluate(x, y)), None, right):
            forward_ms = jax_ms(lambda x, evaluate=evaluate: evaluate(x, y), [x] * (repeats + 1))
            result[name]["forward"] = forward_ms
    return result


def run_shape(shape: Shape) -> dict:
    """One shape: every contender checked, then timed."""
    buffers, labels = problem(shape)
    right = expected(buffers[0], labels)
    result = shape._asdict() | time_torch(buffers, labels, right)
    # Where there is little to compute, gaps between launches count: without them, as JAX's contenders are timed.
    result[OURS_TORCH]["kernels"] = jax_ms(lambda x: train(torch_api.cross_entropy, x, labels), (buffers * 8)[:8])
    logits = buffers[0].detach()
    del buffers
    torch.cuda.empty_cache()
    result |= time_jax(logits, labels, right)
    for name, found in result.items():
        if isinstance(found, dict):
            shown = ", ".join(f"{kind} {found[kind]['ms'] / result['copy_ms']:.3f}" for kind in found if kind in KINDS)
            print(f"{shape.name:22} {name:18} {shown} × copy", flush=True)
    return result


KINDS = ("train", "forward", "none")


def right_step(
    logits: torch.Tensor, targets: torch.Tensor, upstream: torch.Tensor | None = None, **chosen
) -> torch.Tensor:
    """The first rows of the gradient of `mean`, in fp64 by plain operations."""
    divisor: float | torch.Tensor = len(logits)
    if not targets.is_floating_point():
        counted = targets != -100
        weight = chosen.get("weight", torch.ones(logits.shape[-1], device=logits.device))
        divisor = torch.where(counted, weight.double()[targets.clamp(min=0)], 0.0).sum()
    total = functools.partial(torch_api.cross_entropy, reduction="sum", implementation="reference", **chosen)
    rows = right_rows(logits, targets, total) / divisor
    return rows if upstream is None else rows * upstream


def options() -> dict:
    """What each option adds to our training step: multiples of the plain one, interleaved with it."""
    shape = Shape("Llama 3", 4096, LLAMA3)
    (logits,), labels = problem(shape)
    row = torch.arange(len(labels), device="cuda")
    weight = torch.rand(shape.n_classes, device="cuda") + 0.5
    soft = torch.softmax(torch.randn(len(labels), shape.n_classes, device="cuda"), -1).to(logits.dtype)
    into, other = torch.empty_like(logits), torch.empty_like(logits)
    scalar = torch.tensor(3.0, device="cuda")
    in_graph = compiled()

    def step(targets=labels, upstream=None, loss=torch_api.cross_entropy, **chosen):
        value = loss(logits, targets, **chosen)
        return torch.autograd.grad(value, logits, upstream)[0]

    # As prompts before answers are.
    runs = row // 256 % 2 == 0
    alternate = row % 2 == 0

    def read_two_write_one(_):
        torch.add(logits.detach(), soft, out=other)

    def read_half_write_all(kept):
        copy_kept(logits, kept, other)
        ours_is_right("the floor", "" if torch.equal(other, torch.where(kept[:, None], logits, 0)) else "rows")
        return lambda _: copy_kept(logits, kept, other)

    steps: dict[str, dict] = {
        "plain": {},
        "class weights": {"weight": weight},
        "label smoothing": {"label_smoothing": 0.1},
        "z-loss": {"z_loss": 1e-4},
        "soft cap": {"softcap": 30.0},
        "every other row ignored": {"targets": torch.where(alternate, labels, -100)},
        "every other 256 rows ignored": {"targets": torch.where(runs, labels, -100)},
        "upstream gradient of 3": {"upstream": scalar},
        "`torch.compile`": {"loss": in_graph},
        "soft targets": {"targets": soft},
    }
    for name, arguments in steps.items():
        known = {"targets": labels} | {key: value for key, value in arguments.items() if key != "loss"}
        ours_is_right(name, wrong_gradient(step(**arguments), right_step(logits, **known)))
    functions: dict[str, Callable[[int], object]] = {
        name: lambda _, arguments=arguments: step(**arguments) for name, arguments in steps.items()
    }
    functions |= {
        "copy": lambda _: into.copy_(logits.detach()),
        BYTES["soft targets"]: read_two_write_one,
        BYTES["every other row ignored"]: read_half_write_all(alternate),
        BYTES["every other 256 rows ignored"]: read_half_write_all(runs),
    }
    times = interleaved(functions)
    return {"shape": shape._asdict(), "times": times}


@cold_caches()
def run(out: Path | None) -> Path:
    """Runs everything and writes the results as JSON; the file's name tells GPU and date unless one is given."""
    about = environment()
    if out is None:
        gpu = about["gpu"].removeprefix("NVIDIA ").replace(" ", "-").lower()
        out = Path(__file__).parent / "results" / f"{gpu}-{about['date']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    results: dict = {"environment": about, "host": measure(64, 1024), "shapes": []}
    for shape in SHAPES:
        results["shapes"].append(run_shape(shape))
        out.write_text(json.dumps(results, indent=1) + "\n")
    parts = {
        "options": options,
        "few_classes": few_classes,
        "growth": growth,
        "flax_step_bytes": temporary_bytes,
        "compiling": compiling,
    }
    for name, measured in parts.items():
        results[name] = measured()
        out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {out}")
    return out
