"""Device time, and the refusal to time a wrong result."""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch


def cuda_ms(function: Callable[[], object], repeats: int = 20) -> float:
    """The median device time of a call on torch's stream, in milliseconds, by CUDA events.

    The device sleeps before every call, so that the host is ahead and its time between launches does not count.
    """
    for _ in range(3):
        function()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, stop in pairs:
        torch.cuda._sleep(2_000_000)  # cycles: about 1 ms
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


def mistake(loss: torch.Tensor, gradient: torch.Tensor, expected: tuple[float, torch.Tensor], rtol: float) -> str:
    """What is wrong with a contender's loss or the first rows of its gradient; empty if nothing is."""
    right_loss, right_gradient = expected
    # Some contenders round their loss to bf16.
    if abs(loss.item() - right_loss) > (2.0**-8 if loss.dtype == torch.bfloat16 else 1e-5) * abs(right_loss):
        return f"loss {loss.item()}, expected {right_loss}"
    rows = gradient[: len(right_gradient)].double()
    wrong = (rows - right_gradient).abs() > rtol * right_gradient.abs() + 1e-12
    return f"{int(wrong.sum())} of {wrong.numel()} gradient elements" if wrong.any() else ""
