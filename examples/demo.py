"""One language model, trained in Flax and in PyTorch, with our loss and with each framework's own.

    python -m examples.demo [--steps 150] [--out demo.png]

Text, initial weights and batches are the same in the four runs, so the four loss curves have to be the same too: prints
them side by side, draws them, and exits with status 1 if any two of them part by more than the tolerance.
"""

import argparse
import importlib
import multiprocessing
import os
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from examples.common import initial_weights
from examples.text import load_text

# Rounding differs between the frameworks: measured over 150 steps on two CPU cores, any two curves stay within 9.1e-6
# nats, about ten units in the last place of a float32 loss. Ten times that leaves room for other processors. A loss
# that divides by all positions instead of those with a label is 0.5 off in the first step.
TOLERANCE = 1e-4

RUNS = {
    "Flax, ours": ("examples.train_jax", "ours"),
    "Flax, Optax": ("examples.train_jax", "reference"),
    "PyTorch, ours": ("examples.train_torch", "ours"),
    "PyTorch, F.cross_entropy": ("examples.train_torch", "reference"),
}


def run(module: str, loss: str, weights: dict[str, np.ndarray], batches: np.ndarray) -> Iterator[float]:
    """The losses of one training run, as they come, from a process of its own."""
    # Apart, neither framework keeps threads or GPU memory from the other; spawn, because neither survives a fork.
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_train, args=(sender, module, loss, weights, batches), daemon=True)
    process.start()
    sender.close()  # so that a run that dies ends recv with EOFError
    for _ in batches:
        try:
            yield receiver.recv()
        except EOFError:
            process.join()
            raise RuntimeError(f"{module} --loss {loss} ended early, with exit code {process.exitcode}") from None
    process.join()


def _train(sender: Connection, module: str, loss: str, weights: dict[str, np.ndarray], batches: np.ndarray) -> None:
    # On GPUs JAX multiplies fp32 matrices in TF32 unless told otherwise, PyTorch does not.
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    script = importlib.import_module(module)
    for value in script.train(script.load_model(weights), batches, loss):
        sender.send(value)


def differences(curves: np.ndarray) -> np.ndarray:
    """Per step, the largest difference between any two of `curves` [runs, steps]; NaN where a loss is NaN."""
    return curves.max(axis=0) - curves.min(axis=0)


def table(curves: np.ndarray, rows: int = 12) -> str:
    widths = [max(len(name), 10) for name in RUNS]
    shown = np.unique(np.linspace(0, curves.shape[1] - 1, rows).astype(int))
    lines = ["  ".join(["step", *(f"{name:>{width}}" for name, width in zip(RUNS, widths, strict=True)), "difference"])]
    for step, difference in zip(shown, differences(curves)[shown], strict=True):
        losses = (f"{loss:{width}.6f}" for loss, width in zip(curves[:, step], widths, strict=True))
        lines.append("  ".join([f"{step + 1:4}", *losses, f"{difference:10.1e}"]))
    return "\n".join(lines)


def draw(curves: np.ndarray, tolerance: float, path: str) -> None:
    steps = np.arange(1, curves.shape[1] + 1)
    figure = Figure(figsize=(8, 7), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    # Curves that agree hide one another: each is drawn thinner than the one below it.
    for name, curve, width in zip(RUNS, curves, (9, 6, 3, 1), strict=True):
        top.plot(steps, curve, linewidth=width, label=name)
    top.set_ylabel("loss [nats per token]")
    top.legend()
    bottom.semilogy(steps, np.maximum(differences(curves), 1e-7), color="black", label="largest difference of any two")
    bottom.axhline(tolerance, color="red", linestyle="--", label=f"tolerance {tolerance:g}")
    bottom.set(xlabel="step", ylabel="difference [nats]")
    bottom.legend()
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", default="demo.png", help="where the picture goes (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="in nats (default: %(default)s)")
    options = parser.parse_args()

    weights, batches = initial_weights(), load_text().batches(options.steps)
    curves = np.full((len(RUNS), options.steps), np.nan)
    with tqdm(total=curves.size, unit="step") as progress:
        for curve, (name, (module, loss)) in zip(curves, RUNS.items(), strict=True):
            progress.set_description(name)
            for step, value in enumerate(run(module, loss, weights, batches)):
                curve[step] = value
                progress.set_postfix(loss=f"{value:.3f}")
                progress.update()

    print(table(curves))
    draw(curves, options.tolerance, options.out)
    largest = differences(curves).max()
    agree = bool(largest <= options.tolerance)  # False for NaN
    verdict = "within" if agree else "BEYOND"
    print(f"largest difference {largest:.1e} nats, {verdict} the tolerance of {options.tolerance:g}; see {options.out}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
