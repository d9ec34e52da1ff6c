"""Device time, interleaved and from rotating buffers, and the refusal to time a wrong result."""

import functools
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.names import OURS_JAX, OURS_TORCH

Timing = dict[str, float]
ROTATED_BYTES = 2**28  # several times the L2 cache
CHECKED_ROWS = 64


def interleaved[K](functions: Mapping[K, Callable[[int], object]], repeats: int = 15) -> dict[K, Timing]:
    """Device milliseconds of every function on torch's stream, by CUDA events: median, and the quartiles around it.

    All functions take turns, so that a clock that drifts drifts for all. Each gets the number of its turn, to rotate
    buffers by. The device sleeps before every call, so that the host is ahead and its time does not count; then it
    clears its caches, so that none waits for what the one before has not yet written back.
    """
    for function in functions.values():
        for turn in range(3):
            function(turn)
    pairs: dict[K, list] = {name: [] for name in functions}
    for turn in range(repeats):
        for name, function in functions.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(4_000_000)  # cycles: about 2 ms
            clear_caches()
            start.record()
            function(turn)
            stop.record()
            pairs[name].append((start, stop))
    torch.cuda.synchronize()
    return {name: summary([a.elapsed_time(b) for a, b in events]) for name, events in pairs.items()}


@functools.cache
def _clean_memory() -> torch.Tensor:
    return torch.zeros(ROTATED_BYTES // 4, device="cuda")


def clear_caches() -> None:
    """Fills the L2 cache with lines that need not be written back."""
    _clean_memory().sum()


def summary(times: list[float]) -> Timing:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(times, n=4)
    return {"ms": median, "low_ms": low, "high_ms": high}


def train(loss, logits, labels, **options):
    """Loss and gradient with respect to the logits, which are no leaf."""
    value = loss(logits, labels, **options)
    return value, torch.autograd.grad(value, logits)[0]


def read(logits: torch.Tensor) -> None:
    """Reads the logits and writes almost nothing: the ceiling of a forward pass."""
    from benchmarks.ceiling import read_kernel

    block = 16384
    words = logits.detach().flatten().view(torch.int32)
    n = words.numel()
    out = torch.empty(-(-n // block), dtype=torch.int32, device="cuda")
    read_kernel[(len(out),)](words, out, n, EVEN=n % block == 0, BLOCK=block, num_warps=16)  # pyright: ignore


def copy_kept(rows: torch.Tensor, kept: torch.Tensor, out: torch.Tensor) -> None:
    """out: the rows that are kept, and zeros, for which nothing is read: the floor of a step that ignores rows."""
    from benchmarks.ceiling import copy_kept_kernel

    block = 1024
    words, into = (x.detach().view(torch.int32) for x in (rows, out))
    n_rows, n_words = words.shape
    programs = -(-n_words // block)
    grid = (n_rows * programs,)
    copy_kept_kernel[grid](words, kept, into, n_words, programs, block, num_warps=4)  # pyright: ignore


def forward(loss, logits, labels, **options):
    """The loss without a gradient."""
    with torch.no_grad():
        return loss(logits.detach(), labels, **options)


def cuda_ms(function: Callable[[], object], repeats: int = 15) -> float:
    """The median device time of one function in milliseconds."""
    return interleaved({"": lambda _: function()}, repeats)[""]["ms"]


def jax_ms[T](function: Callable[[T], object], inputs: list[T]) -> Timing:
    """Device milliseconds of function over inputs (which it may consume), by JAX's profiler; the first warms up.

    PyTorch's kernels are seen, too: only kernels count, not the gaps between their launches.
    """
    import jax

    jax.block_until_ready(function(inputs.pop()))
    times = []
    for value in inputs:
        clear_caches()
        torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                jax.block_until_ready(function(value))
                torch.cuda.synchronize()
            file = next(Path(folder).rglob("*.xplane.pb"))
            profile = jax.profiler.ProfileData.from_file(str(file))
        nanoseconds = sum(
            event.duration_ns
            for plane in profile.planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        )
        if not nanoseconds:
            raise RuntimeError("the profile holds no device events")
        times.append(nanoseconds / 1e6)
    return summary(times)


def peak_bytes(function: Callable[[], object]) -> int:
    """The most memory that a call holds beyond what was there before."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = function()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def wrong_loss(loss: torch.Tensor, right: float) -> str:
    """What is wrong with a loss; empty if nothing is."""
    # Some contenders round their loss to bf16.
    tolerance = 2.0**-8 if loss.dtype == torch.bfloat16 else 1e-5
    return f"loss {loss.item()}, expected {right}" if not abs(loss.item() - right) <= tolerance * abs(right) else ""


def wrong_gradient(
    gradient: torch.Tensor, right: torch.Tensor, rtol: float = 2.0**-7, atol: torch.Tensor | float = 0.0
) -> str:
    """What is wrong with the first rows of a gradient: all that is right holds of them; empty if nothing is."""
    finest = torch.finfo(gradient.dtype)
    atol = atol + max(1e-12, finest.tiny * finest.eps)
    right_here = (gradient[: len(right)].double() - right).abs() <= rtol * right.abs() + atol
    wrong = right_here.numel() - int(right_here.sum())
    return f"{wrong} of {right_here.numel()} gradient elements" if wrong else ""


def mistake(loss: torch.Tensor, gradient: torch.Tensor, right: tuple[float, torch.Tensor], rtol: float) -> str:
    """What is wrong with a contender's loss or the first rows of its gradient; empty if nothing is."""
    return wrong_loss(loss, right[0]) or wrong_gradient(gradient, right[1], rtol)


SUM = functools.partial(F.cross_entropy, reduction="sum")


def right_rows(
    logits: torch.Tensor,
    targets: torch.Tensor,
    loss: Callable[..., torch.Tensor] = SUM,
    rows: int = CHECKED_ROWS,
) -> torch.Tensor:
    """The gradient of the sum of loss over the first rows, in fp64."""
    leaf = logits[:rows].detach().double().requires_grad_()
    own = targets[:rows]
    return torch.autograd.grad(loss(leaf, own.double() if own.is_floating_point() else own), leaf)[0]


def ours_is_right(what: str, wrong: str) -> None:
    """Raises AssertionError if something is wrong."""
    if wrong:
        raise AssertionError(f"{what}: {wrong}")


def refused(name: str, loss: torch.Tensor, gradient: torch.Tensor | None, right: tuple) -> bool:
    """Whether a contender's result is too wrong to be timed; raises if it is ours. gradient: None for a forward."""
    # One unit in the last place of bf16; some peers round log-probabilities to bf16, and exponentiate those.
    rtol = 0.1 if name in ("torch", "Optax, bf16") else 2.0**-7
    wrong = wrong_loss(loss, right[0]) if gradient is None else mistake(loss, gradient, right, rtol)
    if name in (OURS_TORCH, OURS_JAX):
        ours_is_right(name, wrong)
    if wrong:
        print(f"{name} is wrong and not timed: {wrong}", flush=True)
    return bool(wrong)
