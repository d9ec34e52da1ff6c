"""Searches for a faster row of `ce_kernels.tuning`: compiles candidates in parallel, checks each result, times it."""

import functools
import itertools
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.timing import cuda_ms, wrong_gradient
from ce_kernels import Launch, Problem, plan_fused, plan_grad, plan_stats
from ce_kernels.launch import SHARED_BY
from ce_kernels.tuning import TILED, Config, power_of_two

ROW_OPERANDS = {"stats": (), "grad": ("lse_ptr", "target_sum_ptr", "dloss_ptr"), "fused": ("denominator_ptr",)}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DEVICE = "cuda"


class Task(NamedTuple):
    """What is tuned: a kernel on rows of classes, and what is on."""

    kernel: str
    n_rows: int
    n_classes: int
    dtype: str = "bfloat16"
    soft_targets: bool = False
    label_smoothing: float = 0.0
    in_place: bool = False

    @property
    def problem(self) -> Problem:
        """As a launch sees it, on a GPU where programs may span multiprocessors and share rows."""
        target_stride = self.n_classes if self.soft_targets else 1
        sizes = (self.n_rows, self.n_classes, self.dtype, self.soft_targets)
        strides = (self.n_classes, target_stride, self.n_classes)
        smoothed = self.label_smoothing > 0
        return Problem(*sizes, *strides, clusters=True, shared_rows=True, label_smoothing=smoothed)

    @property
    def scalars(self) -> dict[str, float]:
        """The kernel's scalar arguments that are on."""
        scalars: dict[str, float] = {} if self.soft_targets else {"ignore_index": -100}
        return scalars | ({"label_smoothing": self.label_smoothing} if self.label_smoothing else {})


class Timed(NamedTuple):
    """A candidate and its time as a multiple of copying the logits once."""

    ratio: float
    config: Config


def candidates(kernel: str, n_classes: int, itemsize: int) -> list[Config]:
    """Every plausible configuration of a kernel for rows of n_classes elements of itemsize bytes."""
    # Programs over several multiprocessors pay for rows that would fill L2, or where there are few rows.
    ctas = (1,) if kernel == "grad" or n_classes * itemsize < 2**16 else (1, 2, 4, 8)
    orders = (False, True) if kernel == "fused" else (False,)
    every_class = power_of_two(n_classes)
    longest = max(128, every_class)
    found = []
    if n_classes * itemsize <= TILED["stats"]:
        found += tiles(kernel, every_class)
    for num_ctas, num_warps, vectors, backwards in itertools.product(ctas, (1, 2, 4, 8, 16, 32), (1, 2, 4), orders):
        block = num_ctas * num_warps * 32 * vectors * 16 // itemsize
        if 128 <= block <= min(longest, 131072) and block * 256 >= n_classes:
            found.append(Config(block, num_warps, num_ctas, backwards=backwards))
    if kernel == "fused" and n_classes * itemsize >= 2**15:
        found += shared(n_classes, itemsize)
    return found


def shared(n_classes: int, itemsize: int) -> list[Config]:
    """Configurations of programs that share a row, of which each has a few steps."""
    found = []
    for steps, num_warps, vectors in itertools.product((2, 3, 4, 5, 6, 8), (2, 4, 8, 16), (1, 2)):
        block = num_warps * 32 * vectors * 16 // itemsize
        if 2 <= -(-n_classes // (steps * block)) <= SHARED_BY:
            found.append(Config(block, num_warps, backwards=True, steps=steps))
    return found


def refinements(config: Config) -> list[Config]:
    """A row kernel's configuration with more steps in flight together and fewer registers a thread."""
    if config.rows:
        return []
    variants = itertools.product((1, 2, 3, 4, 5, 6), (None, 32, 40, 48, 56, 64, 72))
    return [replace(config, unroll=unroll, max_registers=registers) for unroll, registers in variants][1:]


def tiles(kernel: str, block: int) -> list[Config]:
    """Every plausible tile of rows that take one step of block classes."""
    found = []
    for elements, num_warps, row_a_thread in itertools.product(
        (512, 1024, 2048, 4096), (1, 2, 4), (False,) if kernel == "grad" else (False, True)
    ):
        rows, threads = elements // block, 32 * num_warps
        if rows and 8 <= elements // threads <= 64 and (rows >= threads or not row_a_thread):
            found.append(Config(block, num_warps, rows=rows, row_a_thread=row_a_thread))
    return found


def plan(task: Task, config: Config | None) -> Launch:
    """A training launch; None: with the configuration that `ce_kernels.tuning` has for it."""
    if task.kernel == "stats":
        return plan_stats(task.problem, with_argmax=False, config=config)
    if task.kernel == "grad":
        upstream = {"dloss_stride": 1, "dlse_stride": 0, "dtarget_dtype": None}
        return plan_grad(task.problem, **upstream, in_place=task.in_place, config=config)
    return plan_fused(task.problem, denominator_stride=0, in_place=task.in_place, config=config)


def compile_ahead(task: Task, config: Config | None) -> str:
    """Fills Triton's cache; returns what went wrong."""
    from triton.runtime.jit import MockTensor

    from ce_kernels import kernels

    launch = plan(task, config)
    function = getattr(kernels, launch.kernel)
    arrays = {"logits_ptr": task.dtype, "target_ptr": task.dtype if task.soft_targets else "int64"}
    arrays |= dict.fromkeys(ROW_OPERANDS[task.kernel], "float32")
    arrays |= {output.name: output.dtype for output in launch.outputs}
    arrays = {name: MockTensor(getattr(torch, dtype)) for name, dtype in arrays.items()}
    arguments = dict.fromkeys(function.arg_names) | arrays | task.scalars | dict(launch.constants)
    try:
        function.warmup(**arguments, grid=launch.grid, **launch.options)
    except Exception as error:
        return repr(error)[-300:]
    return ""


def compile_all(task: Task, configs: list[Config | None]) -> list[str]:
    """`compile_ahead` of every configuration, in as many processes as there are cores."""
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(compile_ahead, [task] * len(configs), configs))


class Arrays(NamedTuple):
    """The problem; of its right result loss, lse and s = Σq of every row, and the gradient of some rows of a sum.

    terms: s·p + q, whose difference the gradient is.
    """

    logits: torch.Tensor
    target: torch.Tensor
    loss: torch.Tensor
    lse: torch.Tensor
    target_sum: torch.Tensor
    some: torch.Tensor
    gradient: torch.Tensor
    terms: torch.Tensor


def make(task: Task) -> Arrays:
    """Random logits and targets, and what PyTorch makes of them, in blocks of rows."""
    torch.manual_seed(0)
    shape, dtype = (task.n_rows, task.n_classes), DTYPES[task.dtype]
    logits = (torch.randn(shape, device=DEVICE) * 3).to(dtype)
    if task.soft_targets:
        target = torch.softmax(torch.randn(shape, device=DEVICE), -1).to(dtype)
    else:
        target = torch.randint(0, task.n_classes, (task.n_rows,), device=DEVICE)

    def rows(x, y, dtype, reduction):
        y = y.to(dtype) if task.soft_targets else y
        return F.cross_entropy(x.to(dtype), y, reduction=reduction, label_smoothing=task.label_smoothing)

    parts = list(zip(logits.split(256), target.split(256), strict=True))
    loss = torch.cat([rows(x, y, torch.float32, "none") for x, y in parts])
    lse = torch.cat([x.float().logsumexp(-1) for x, _ in parts])
    target_sum = torch.cat([y.float().sum(-1) if task.soft_targets else torch.ones_like(y).float() for _, y in parts])
    some = torch.tensor([0, 1, task.n_rows // 2, task.n_rows - 1], device=DEVICE)
    leaf = logits[some].double().requires_grad_()
    (gradient,) = torch.autograd.grad(rows(leaf, target[some], torch.float64, "sum"), leaf)
    terms = (2 * torch.softmax(leaf.detach(), -1) - gradient).abs()
    return Arrays(logits, target, loss, lse, target_sum, some, gradient, terms)


def tune(task: Task, configs: Sequence[Config | None] | None = None) -> list[Timed]:
    """Configurations that give the right result, the fastest first; by default candidates, then refined the best."""
    arrays = make(task)
    if configs is not None:
        return time_right(task, arrays, configs)
    found = time_right(task, arrays, candidates(task.kernel, task.n_classes, arrays.logits.element_size()))
    if task.kernel != "grad":
        found += time_right(task, arrays, [finer for one in found[:4] for finer in refinements(one.config)])
    return sorted(found, key=lambda one: one.ratio)


def time_right(task: Task, arrays: Arrays, configs: Sequence[Config | None]) -> list[Timed]:
    """Those of configurations that give the right result, the fastest first."""
    from ce_kernels import kernels

    errors = compile_all(task, list(configs))
    loss, lse, sums = (torch.empty(task.n_rows, device=DEVICE) for _ in range(3))
    dlogits = torch.empty_like(arrays.logits)
    operands = {"target_ptr": arrays.target, "loss_ptr": loss, "lse_ptr": lse, "target_sum_ptr": sums, **task.scalars}
    operands |= {"dlogits_ptr": None if task.in_place else dlogits, "denominator_ptr": torch.ones((), device=DEVICE)}
    operands |= {"dloss_ptr": torch.ones(task.n_rows, device=DEVICE)}
    copy = cuda_ms(lambda: dlogits.copy_(arrays.logits))
    timed = []
    for config, error in zip(configs, errors, strict=True):
        if error:
            print(f"not compiled: {config}: {error}")
            continue
        launch = plan(task, config)
        function = getattr(kernels, launch.kernel)
        logits = arrays.logits.clone() if task.in_place else arrays.logits
        gradient = logits if task.in_place else dlogits
        given = operands | {"logits_ptr": logits}
        arguments = {name: given.get(name) for name in function.arg_names} | dict(launch.constants)
        dlogits.fill_(float("nan"))
        loss.fill_(float("nan"))
        lse.copy_(arrays.lse)
        sums.copy_(arrays.target_sum)
        for output in launch.outputs:
            if output.zeroed:
                arguments[output.name] = torch.zeros(output.shape, dtype=getattr(torch, output.dtype), device=DEVICE)
        run = functools.partial(_run, function[launch.grid], arguments, launch)
        try:
            run()
            torch.cuda.synchronize()
        except Exception as error:
            print(f"not launched: {config}: {error!r}"[:200])
            continue
        wrong = task.kernel != "grad" and not torch.allclose(loss, arrays.loss, rtol=1e-5, atol=1e-5)
        if task.kernel != "stats":
            # Of terms that nearly cancel, fp32's rounding of p is left, and that of lse in it.
            difference = wrong_gradient(gradient[arrays.some], arrays.gradient, atol=2.0**-16 * arrays.terms)
            wrong |= bool(difference) or bool(gradient.isnan().any())
        if wrong:
            print(f"wrong: {config}")
            continue
        timed.append(Timed(cuda_ms(run, 12) / copy, launch.config))
    return sorted(timed, key=lambda one: one.ratio)


def _run(function: Callable, arguments: dict, launch: Launch) -> None:
    for output in launch.outputs:
        if output.zeroed:
            arguments[output.name].zero_()
    function(**arguments, **launch.options)
