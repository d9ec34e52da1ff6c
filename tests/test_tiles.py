"""Tiles, many rows a program: short rows, classes that lie apart; and one row a program on the same cases."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ce_kernels import Options, Problem, plan_fused
from tests.cases import CASES
from tests.conftest import HAS_GPU
from tests.frontends import Torch, each_torch_kernel
from tests.test_contract import check_case
from torch_api import cross_entropy, launch
from torch_api.rows import Inputs, RowSpec

DEVICE = "cuda" if HAS_GPU else "cpu"
# Labels out of range raise on the CPU; one spread of each dtype is enough.
SHORT = [
    case
    for case in CASES
    if case.n_classes <= 2100 and case.labels != "invalid" and not case.name.endswith(("_0.1", "_20"))
]
each_short_case = pytest.mark.parametrize("case", SHORT, ids=lambda case: case.name)


class ClassesFirst(Torch):
    """torch_api on matrices stored by columns, so that the classes of a row lie apart."""

    def array(self, x: np.ndarray) -> torch.Tensor:
        return super().array(x.T).T if x.ndim == 2 else super().array(x)


@each_torch_kernel
@each_short_case
def test_one_row_a_program(one_row_a_program, case, frontend):
    for reduction in ("mean", "none"):
        check_case(frontend, case, reduction)


@each_torch_kernel
@each_short_case
def test_tiles_of_many_steps(small_tiles, case, frontend):
    for reduction in ("mean", "none"):
        check_case(frontend, case, reduction)


@each_torch_kernel
@each_short_case
def test_classes_that_lie_apart(case, frontend):
    for reduction in ("mean", "none"):
        check_case(ClassesFirst(frontend.implementation, frontend.device), case, reduction)


def check_groups_of_rows(shape, reduction, dtype=torch.float32, **options) -> None:
    """(N, C, d1, …) with ignored labels whose rows hold NaN, against PyTorch in float64."""
    torch.manual_seed(0)
    logits = torch.randn(shape, device=DEVICE).to(dtype)
    labels = torch.randint(0, shape[1], (shape[0], *shape[2:]), device=DEVICE)
    labels.view(-1)[::3] = -100
    right = logits.double().requires_grad_()
    # As a matrix: PyTorch's own for more dimensions is not deterministic on a GPU.
    rows = right.movedim(1, -1).reshape(-1, shape[1])
    expected = F.cross_entropy(rows, labels.flatten(), reduction=reduction, **options)
    expected = expected.view(labels.shape) if reduction == "none" else expected
    upstream = torch.rand_like(expected)
    (dright,) = torch.autograd.grad(expected, right, upstream)
    logits.movedim(1, -1)[labels == -100] = float("nan")
    logits.requires_grad_()
    loss = cross_entropy(logits, labels, reduction=reduction, implementation="triton", **options)
    (dlogits,) = torch.autograd.grad(loss, logits, upstream.to(loss.dtype))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    rtol, atol = (2e-2, 1e-3) if dtype == torch.bfloat16 else (1e-4, 1e-6)
    torch.testing.assert_close(dlogits.double(), dright, rtol=rtol, atol=atol)
    assert dlogits.stride() == logits.stride()


SHAPES = [(3, 5, 70), (2, 130, 9), (4, 7, 8, 9), (2, 3, 300), (2, 300, 16), (1, 20, 64), (5, 4, 1, 1, 3)]


@pytest.mark.parametrize("reduction", ["mean", "none", "sum"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_groups_of_rows(shape, reduction):
    check_groups_of_rows(shape, reduction)
    check_groups_of_rows(shape, reduction, torch.bfloat16, label_smoothing=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", [(2, 21, 64, 64), (3, 1000, 7, 7), (2, 19, 33, 65), (2, 5000, 50)], ids=str)
def test_groups_of_rows_on_a_gpu(shape, reduction):
    check_groups_of_rows(shape, reduction)
    check_groups_of_rows(shape, reduction, torch.bfloat16, label_smoothing=0.1)


def test_offsets_beyond_32_bits_are_held():
    """A launch's levels and strides stay numbers of any size, and its programs cover every group."""
    inner, classes = 2**22, 1000
    problem = Problem(
        8 * inner, classes, "bfloat16", False, 1, 1, classes, inner, inner * classes, 1, inner * classes, inner, inner
    )
    launch = plan_fused(problem, denominator_stride=0, in_place=False)
    constants = dict(launch.constants)
    assert constants["logits_outer_stride"] == inner * classes > 2**31
    assert constants["logits_class_stride"] == inner
    assert launch.grid[0] == 8 * inner // constants["ROWS"]


def test_ignored_rows_have_no_lse():
    logits = torch.randn(7, 5, device=DEVICE)
    labels = torch.tensor([0, -100, 1, 2, -100, 3, 4], device=DEVICE)
    inputs, spec = Inputs(logits, labels, None), RowSpec(Options(), "triton")
    out = launch.stats(inputs, spec, with_argmax=False)
    torch.testing.assert_close(out.lse, torch.where(labels == -100, 0.0, logits.logsumexp(-1)))
    assert launch.stats(inputs, spec, with_argmax=True).lse.isfinite().all()
