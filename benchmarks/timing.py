"""Device time, and the refusal to time a wrong result."""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch


def cuda_ms(function: Callable[[], object], repeats: int = 20) -> float:
    """The median device time of a call on torch's stream, in milliseconds, by CUDA events."""
    for _ in range(3):
        function()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, stop in pairs:
        start.record()
        function()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in pairs)


def jax_ms(function: Callable[[object], object], inputs: list) -> float:
    """The mean device time of function over inputs (which it may consume), in milliseconds, by JAX's profiler."""
    import jax

    jax.block_until_ready(function(inputs.pop()))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready([function(value) for value in inputs])
        file = next(Path(folder).rglob("*.xplane.pb"))
        profile = jax.profiler.ProfileData.from_file(str(file))
    nanoseconds = 0.0
    for plane in profile.planes:
        if plane.name.startswith("/device:GPU"):
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    nanoseconds += sum(event.duration_ns for event in line.events)
    if not nanoseconds:
        raise RuntimeError("the profile holds no device events")
    return nanoseconds / len(inputs) / 1e6


def check(name: str, loss: float, gradient: torch.Tensor, expected: tuple[float, torch.Tensor]) -> None:
    """Raises AssertionError unless loss and the first rows of the gradient are right: no wrong result is timed."""
    right_loss, right_gradient = expected
    if abs(loss - right_loss) > 1e-4 * abs(right_loss):
        raise AssertionError(f"{name}: loss {loss}, expected {right_loss}")
    rows = gradient[: len(right_gradient)].double()
    # Half a unit in the last place of bf16, and as much again for a second rounding.
    wrong = (rows - right_gradient).abs() > 2.0**-7 * right_gradient.abs() + 1e-12
    if wrong.any():
        raise AssertionError(f"{name}: {int(wrong.sum())} of {wrong.numel()} gradient elements are wrong")
