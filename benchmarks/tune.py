"""Searches for a faster row of `ce_kernels.tuning`: compiles candidates in parallel, checks each result, times it."""

import itertools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch

from benchmarks.timing import cuda_ms
from ce_kernels import Launch, Problem, plan_fused, plan_grad, plan_stats
from ce_kernels.tuning import TILED, Config, power_of_two

ROW_OPERANDS = {"stats": (), "grad": ("lse_ptr", "target_sum_ptr", "dloss_ptr"), "fused": ("denominator_ptr",)}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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
    return found


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


def plan(kernel: str, problem: Problem, config: Config) -> Launch:
    """A training launch of the plain loss."""
    if kernel == "stats":
        return plan_stats(problem, with_argmax=False, config=config)
    if kernel == "grad":
        return plan_grad(problem, dloss_stride=1, dlse_stride=0, dtarget_dtype=None, in_place=False, config=config)
    return plan_fused(problem, denominator_stride=0, in_place=False, config=config)


def compile_ahead(kernel: str, problem: Problem, config: Config) -> str:
    """Fills Triton's cache; returns what went wrong."""
    from triton.runtime.jit import MockTensor

    from ce_kernels import kernels

    launch = plan(kernel, problem, config)
    function = getattr(kernels, launch.kernel)
    arrays = {"logits_ptr": problem.logits_dtype, "target_ptr": "int64"}
    arrays |= dict.fromkeys(ROW_OPERANDS[kernel], "float32")
    arrays |= {output.name: output.dtype for output in launch.outputs}
    arrays = {name: MockTensor(getattr(torch, dtype)) for name, dtype in arrays.items()}
    scalars = {"ignore_index": -100}
    arguments = dict.fromkeys(function.arg_names) | arrays | scalars | dict(launch.constants)
    try:
        function.warmup(**arguments, grid=launch.grid, **launch.options)
    except Exception as error:
        return repr(error)[-300:]
    return ""


def tune(
    kernel: str, n_rows: int, n_classes: int, dtype: str = "bfloat16", chosen: list[Config] | None = None
) -> list[Timed]:
    """Candidates that give the right result, the fastest first."""
    from ce_kernels import kernels

    torch.manual_seed(0)
    logits = (torch.randn(n_rows, n_classes, device="cuda") * 3).to(DTYPES[dtype])
    target = torch.randint(0, n_classes, (n_rows,), device="cuda")
    problem = Problem(n_rows, n_classes, dtype, False, n_classes, 1, n_classes, clusters=True)
    configs = candidates(kernel, n_classes, logits.element_size()) if chosen is None else chosen
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        errors = list(pool.map(compile_ahead, *zip(*((kernel, problem, config) for config in configs), strict=True)))
    lse = torch.cat([part.float().logsumexp(-1) for part in logits.split(256)])
    right_loss = lse - logits.gather(1, target[:, None])[:, 0].float()
    some = torch.tensor([0, 1, n_rows // 2, n_rows - 1], device="cuda")
    right = torch.softmax(logits[some].double(), -1)
    right[torch.arange(4), target[some]] -= 1.0
    loss, lse_out, sums = (torch.empty(n_rows, device="cuda") for _ in range(3))
    dlogits = torch.empty_like(logits)
    operands = {
        "target_ptr": target,
        "logits_ptr": logits,
        "ignore_index": -100,
        "dlogits_ptr": dlogits,
        "loss_ptr": loss,
    }
    operands |= {"lse_ptr": lse_out, "target_sum_ptr": sums, "denominator_ptr": torch.ones((), device="cuda")}
    operands |= {"dloss_ptr": torch.ones(n_rows, device="cuda")}
    copy = cuda_ms(lambda: dlogits.copy_(logits))
    timed = []
    for config, error in zip(configs, errors, strict=True):
        if error:
            print(f"not compiled: {config}: {error}")
            continue
        launch = plan(kernel, problem, config)
        function = getattr(kernels, launch.kernel)
        arguments = {name: operands.get(name) for name in function.arg_names} | dict(launch.constants)
        dlogits.fill_(float("nan"))
        loss.fill_(float("nan"))
        lse_out.copy_(lse)
        sums.fill_(1.0)

        def run(function=function, launch=launch, arguments=arguments):
            function[launch.grid](**arguments, **launch.options)

        try:
            run()
            torch.cuda.synchronize()
        except Exception as error:
            print(f"not launched: {config}: {error!r}"[:200])
            continue
        wrong = kernel != "grad" and not torch.allclose(loss, right_loss, rtol=1e-5, atol=1e-5)
        if kernel != "stats":
            difference = (dlogits[some].double() - right).abs()
            wrong |= not bool((difference <= 2.0**-7 * right.abs() + 1e-12).all()) or bool(dlogits.isnan().any())
        if wrong:
            print(f"wrong: {config}")
            continue
        timed.append(Timed(cuda_ms(run, 12) / copy, config))
    return sorted(timed, key=lambda one: one.ratio)
