"""The one place of this front end that runs a row operation: the Triton kernels, or the plain operations.

Arguments are rows: logits [N, V] with unit stride in the classes, target [N] or [N, V], row vectors [N].
"""

import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ce_kernels import Launch, Options, Problem, plan_fused, plan_grad, plan_stats
from ce_kernels.spec import check_implementation, fail
from torch_api import reference


class Stats(NamedTuple):
    """loss, lse, s = Σq and the argmax (None unless asked for) of every row."""

    loss: Tensor
    lse: Tensor
    target_sum: Tensor
    predicted: Tensor | None


def choose_implementation(implementation: str | None, device: torch.device) -> str:
    """'triton' on CUDA devices where Triton is installed, 'reference' elsewhere; an impossible wish raises."""
    check_implementation(implementation)
    if implementation == "reference":
        return "reference"
    installed = importlib.util.find_spec("triton") is not None
    if implementation is None:
        return "triton" if device.type == "cuda" and installed else "reference"
    if not installed:
        fail(RuntimeError, "implementation='triton'", "an installed triton", "implementation=None")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        fail(
            RuntimeError,
            f"implementation='triton' for tensors on {device}",
            "a GPU, or Triton's interpreter (environment variable TRITON_INTERPRET=1)",
            "implementation=None to choose by device",
        )
    return "triton"


def stats(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: Options, implementation: str, *, with_argmax: bool
) -> Stats:
    """Per-row statistics: one read of the logits."""
    if implementation == "reference":
        return Stats(*reference.stats(logits, target, weight, options, with_argmax))
    launch = plan_stats(_problem(logits, target), with_argmax=with_argmax)
    out = _run(launch, options, logits, {"target_ptr": target, "weight_ptr": weight})
    return Stats(out["loss_ptr"], out["lse_ptr"], out["target_sum_ptr"], out.get("predicted_ptr"))


def grad(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    target_sum: Tensor,
    dloss: Tensor,
    dlse: Tensor | None,
    options: Options,
    implementation: str,
    *,
    with_dtarget: bool,
    in_place: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """dlogits (and dtarget) for upstream gradients of loss and lse: one read, one write.

    in_place: the kernels write dlogits over the logits; the plain operations need a new tensor all the same.
    """
    if implementation == "reference":
        return reference.grad(logits, target, weight, lse, target_sum, dloss, dlse, options, with_dtarget)
    launch = plan_grad(
        _problem(logits, target),
        dloss_stride=dloss.stride(0),
        dlse_stride=0 if dlse is None else dlse.stride(0),
        dtarget_dtype=_dtype_name(target) if with_dtarget else None,
        in_place=in_place,
    )
    operands = {
        "target_ptr": target,
        "weight_ptr": weight,
        "lse_ptr": lse,
        "target_sum_ptr": target_sum,
        "dloss_ptr": dloss,
        "dlse_ptr": dlse,
    }
    out = _run(launch, options, logits, operands)
    return out.get("dlogits_ptr", logits), out.get("dtarget_ptr")


def fused(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    denominator: Tensor,
    options: Options,
    implementation: str,
    *,
    in_place: bool = False,
) -> tuple[Stats, Tensor]:
    """Statistics, and dlogits of Σ loss / denominator for a 0-d denominator; in_place as for `grad`."""
    if implementation == "reference":
        out = Stats(*reference.stats(logits, target, weight, options, False))
        dloss = denominator.reciprocal().expand(len(logits))
        dlogits, _ = reference.grad(
            logits, target, weight, out.lse, out.target_sum, dloss, None, options, with_dtarget=False
        )
        return out, dlogits
    launch = plan_fused(_problem(logits, target), denominator_stride=0, in_place=in_place)
    operands = {"target_ptr": target, "weight_ptr": weight, "denominator_ptr": denominator}
    out = _run(launch, options, logits, operands)
    return Stats(out["loss_ptr"], out["lse_ptr"], out["target_sum_ptr"], None), out.get("dlogits_ptr", logits)


def scaled(values: Tensor, scale: Tensor, implementation: str) -> Tensor:
    """values · scale for a 0-d scalar; under Triton in the buffer of values, where a scale of 1 costs no pass."""
    if implementation == "reference":
        return (values * scale).to(values.dtype)
    from ce_kernels.kernels import scale_kernel

    # A few programs a multiprocessor: enough to fill a device, few enough to cost nothing when they have nothing to do.
    block, programs = 4096, 1024
    with _on_device(values):
        scale_kernel[(min(programs, -(-values.numel() // block)),)](
            values,
            scale,
            values.numel(),
            BLOCK=block,
            num_warps=8,  # pyright: ignore[reportCallIssue]
        )
    # `.data`: its receiver may write to it (.grad accumulates in place) without invalidating the node that saved it,
    # which never reads it again.
    return values.data


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _problem(logits: Tensor, target: Tensor) -> Problem:
    n_rows, n_classes = logits.shape
    return Problem(
        n_rows=n_rows,
        n_classes=n_classes,
        logits_dtype=_dtype_name(logits),
        soft_targets=target.is_floating_point(),
        # A tensor of one row may claim any stride; a constant one keeps it from being compiled again.
        logits_stride=logits.stride(0) if n_rows > 1 else n_classes,
        target_stride=target.stride(0) if n_rows > 1 else n_classes if target.ndim == 2 else 1,
        total_classes=n_classes,
    )


def _on_device(tensor: Tensor):
    return torch.cuda.device_of(tensor)


def _run(launch: Launch, options: Options, logits: Tensor, operands: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Allocates the launch's outputs, launches, and returns them by parameter name."""
    from ce_kernels import kernels

    out = {
        output.name: torch.empty(output.shape, dtype=getattr(torch, output.dtype), device=logits.device)
        for output in launch.outputs
    }
    if launch.grid[0] == 0:
        return out
    scalars: dict[str, Any] = {**options.scalars()}
    constants = dict(launch.constants)
    if constants["SCALARS_IN_MEMORY"]:
        scalars |= {
            name: torch.full((), value, dtype=logits.dtype, device=logits.device)
            for name, value in scalars.items()
            if isinstance(value, float)
        }
    kernel = getattr(kernels, launch.kernel)
    arguments = dict.fromkeys(kernel.arg_names) | {"logits_ptr": logits} | operands | scalars | out | constants
    with _on_device(logits):
        kernel[launch.grid](
            **arguments,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            enable_fp_fusion=launch.enable_fp_fusion,
        )
    return out
