"""Tiles, many rows a program: short rows, classes that lie apart; and one row a program on the same cases."""

import mmap
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ce_kernels import Options
from tests.cases import CASES
from tests.conftest import HAS_GPU
from tests.frontends import Torch, each_torch_kernel
from tests.test_contract import check_case
from torch_api import cross_entropy, cross_entropy_rows, launch, slices
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
def test_classes_that_lie_apart(monkeypatch, case, frontend):
    monkeypatch.setattr(slices, "FEW_NEIGHBOURS", 0)
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


SHAPES = [(3, 5, 70), (2, 130, 9), (4, 7, 8, 9), (2, 3, 300), (2, 300, 16), (1, 20, 64), (5, 4, 1, 1, 3), (1, 1030, 20)]


def test_few_neighbours_and_few_tiles_are_read_by_slices():
    read_by_slices = {(2, 130, 9), (5, 4, 1, 1, 3), (1, 1030, 20)}
    for shape in SHAPES:
        logits = torch.zeros(shape).movedim(1, -1)
        inputs = Inputs(logits, torch.zeros(logits.shape[:-1], dtype=torch.long), None)
        assert slices.is_scattered(inputs) == (shape in read_by_slices), shape


def test_a_crop_and_its_gradient_have_strides_of_their_own():
    """What the loss reads is no gradient of its, and neither is contiguous; the argmax is that of the crop."""
    whole = torch.randn(2, 21, 45, device=DEVICE, requires_grad=True)
    labels = torch.randint(0, 21, (2, 20), device=DEVICE)
    expected = F.cross_entropy(whole[..., :20].movedim(1, -1).reshape(-1, 21), labels.flatten())
    (right,) = torch.autograd.grad(expected, whole)
    crop = whole.detach()[..., :20].requires_grad_()
    for reduction in ("mean", "none"):
        loss = cross_entropy(crop, labels, reduction=reduction, implementation="triton").mean()
        (gradient,) = torch.autograd.grad(loss, crop)
        torch.testing.assert_close(gradient, right[..., :20])
        assert gradient.is_contiguous()
    rows = cross_entropy_rows(crop, labels, implementation="triton")
    torch.testing.assert_close(rows.lse, crop.logsumexp(1))
    assert torch.equal(rows.predicted, crop.argmax(1))


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


@pytest.mark.skipif(HAS_GPU, reason="the interpreter reads the host's memory")
@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is taken when it is written to")
@pytest.mark.parametrize("strides", [(2**34 + 8, 1, 2**31 + 16), (2**34 + 8, 2**31 + 16, 1)], ids=str)
def test_offsets_beyond_32_bits(monkeypatch, strides):
    monkeypatch.setattr(slices, "FEW_NEIGHBOURS", 0)
    no_reserve = 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, 4 * (2**34 + 3 * 2**31 + 2**10), flags=flags)
    logits = torch.frombuffer(memory, dtype=torch.float32).as_strided((2, 4, 3), strides)
    small = torch.randn(2, 4, 3)
    logits.copy_(small)
    labels = torch.tensor([[0, 1, 2, -100], [2, 1, 0, 1]])
    expected = cross_entropy(small.requires_grad_(), labels, dim=-1)
    (right,) = torch.autograd.grad(expected, small)
    for reduction in ("mean", "none"):
        leaf = logits.detach().requires_grad_()
        loss = cross_entropy(leaf, labels, dim=-1, reduction=reduction, implementation="triton")
        loss = loss if reduction == "mean" else loss.sum() / 7
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], right)


def test_ignored_rows_have_no_lse():
    logits = torch.randn(7, 5, device=DEVICE)
    labels = torch.tensor([0, -100, 1, 2, -100, 3, 4], device=DEVICE)
    inputs, spec = Inputs(logits, labels, None), RowSpec(Options(), "triton")
    out = launch.stats(inputs, spec, with_argmax=False)
    torch.testing.assert_close(out.lse, torch.where(labels == -100, 0.0, logits.logsumexp(-1)))
    torch.testing.assert_close(launch.stats(inputs, spec, with_argmax=True).lse, logits.logsumexp(-1))
