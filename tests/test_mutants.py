"""The suite must kill broken kernels: each mutant is one edit of the source, and at least one case must notice it."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import InterpreterError

import ce_kernels
from ce_kernels import Options, elements, gradients, kernels, merging, statistics, tiles
from jax_api import sharding
from tests.cases import CASES, LONG_CASES
from tests.conftest import HAS_GPU
from tests.frontends import Jax, Torch
from tests.test_contract import check_case, check_rows_of_a_wider_buffer
from tests.test_tiles import (
    check_groups_of_rows,
    test_a_crop_and_its_gradient_have_strides_of_their_own,
    test_ignored_rows_have_no_lse,
)
from torch_api import launch, losses, reductions, rules
from torch_api.rows import Inputs, RowSpec

KERNEL_MUTANTS = {
    "zero_off_target": (
        "dx = tl.where(is_label, dx - dloss * label_mass, dx)",
        "dx = tl.where(is_label, dx - dloss * label_mass, 0.0)",
    ),
    "off_target_1_percent_large": (
        "dx = tl.where(is_label, dx - dloss * label_mass, dx)",
        "dx = tl.where(is_label, dx - dloss * label_mass, 1.01 * dx)",
    ),
    "smoothing_missing_in_gradient": ("dx, dx - dloss * uniform)", "dx, dx)"),
    "spread_missing_in_gradient": ('tl.fma(tl.where(x == float("-inf"), 0.0, -dloss), q, dx)', "dx + 0.0 * q"),
    "spread_of_masked_classes": ('tl.fma(tl.where(x == float("-inf"), 0.0, -dloss), q, dx)', "tl.fma(-dloss, q, dx)"),
    "neighbouring_rows_in_the_spread": ("return q if inside is None else tl.where(inside, q, 0.0)", "return q"),
    "soft_targets_shifted_twice": ("load_columns(row_ptr, position, mask", "load_columns(row_ptr, cols, mask"),
    "padded_lanes_in_the_sum_of_logits": ("x = x if inside is None else tl.where(inside, x, 0.0)", "x = x + 0.0"),
    "smoothing_over_one_class_more": ("spread = N_CLASSES * uniform", "spread = (N_CLASSES + 1) * uniform"),
    "smoothing_over_one_class_less": (
        "label_smoothing / TOTAL_CLASSES",
        "label_smoothing / (TOTAL_CLASSES - 1)",
    ),
    "z_loss_missing_in_gradient": ("a = a + 2.0 * z_loss * lse", "a = a + 0.0 * z_loss"),
    "z_loss_missing_in_loss": ("loss += z_loss * lse * lse", "loss += 0.0 * z_loss"),
    "padded_lanes_counted": (
        'mask=mask, other=float("-inf"), eviction_policy=EVICTION)',
        "mask=mask, other=0.0, eviction_policy=EVICTION)",
    ),
    "neighbouring_rows_counted": (
        'r = tl.where((position >= shift) & (position < end), r, float("-inf"))',
        "r = r + 0.0",
    ),
    "last_column_dropped_from_statistics": (
        "(position < end), r",
        "(position < end - 1), r",
    ),
    "last_column_dropped_from_gradient": (
        "inside = (cols >= 0) & (cols < end - shift)\n    ptrs = row_ptr",
        "inside = (cols >= 0) & (cols < end - shift - 1)\n    ptrs = row_ptr",
    ),
    "ends_of_rows_not_stored": ("mask=inside & ~whole)", "mask=whole)"),
    "class_weight_ignored_for_label": ("mass = mass * tl.load(weight_ptr + safe).to(DTYPE)", "mass = mass * 1.0"),
    "class_weight_ignored_for_spread": (
        'q = q * load_columns(weight_ptr, cols, inside, "").to(DTYPE)',
        "q = q * 1.0",
    ),
    "first_row_scales_every_row": ("dloss_ptr + row * DLOSS_STRIDE", "dloss_ptr + 0 * row"),
    "masked_group_poisons": ('shift_by = tl.where(m_new == float("-inf"), 0.0, m_new)', "shift_by = m_new"),
    "invalid_label_gives_zero": ('tl.where(invalid, float("nan"), loss)', "tl.where(invalid, 0.0, loss)"),
    "softcap_slope_missing": ("slope = slope * (4.0 * (e * w) * w)", "slope = slope * 1.0"),
    "running_sum_not_rescaled": ("d = d * power((m - shift_by) * per_nat) + ", "d = d + "),
    "scale_slope_missing": ("slope = slope * logit_scale", "slope = slope * 1.0"),
    "dtarget_smoothing_missing": (
        "+ dloss\n    if label_smoothing is not None:",
        "+ dloss\n    if label_smoothing is None:",
    ),
    "ignored_rows_counted": (
        "tl.store(loss_ptr + row, 0.0)",
        "tl.store(loss_ptr + row, 1.0)",
    ),
}

CLUSTER_MUTANTS = {
    "merged_sums_not_rescaled": ("return larger, d * power(", "return larger, d + 0.0 * power("),
    "masked_groups_poison": ('shift_by = tl.where(larger == float("-inf"), 0.0, larger)', "shift_by = larger"),
    "spread_of_one_group_lost": ("addend(high + other_high)", "addend(high)"),
    "uniform_spread_not_exchanged": ("qx, _ = unpaired(qx)\n    else:", "qx, _ = unpaired(md)\n    else:"),
    "spread_confused_with_its_sum": (
        "md, qx = tl.split(left)",
        "md, _ = tl.split(left)\n        qx, _ = tl.split(right)",
    ),
}

SHARED_MUTANTS = {
    "every_row_is_the_first": ("+ row * (PROGRAMS * WORDS)", "+ 0 * row * (PROGRAMS * WORDS)"),
    "another_part_is_not_heard": ("(row * PROGRAMS + program) * WORDS", "(row * PROGRAMS + program // 2) * WORDS"),
    "a_masked_part_has_a_maximum": ('~pair(tl.where(d == 0, float("-inf"), m), d)', "~pair(m, d)"),
    "sums_of_x_and_of_q_confused": ("qx, q_sum = unpaired(q)", "q_sum, qx = unpaired(q)"),
    "spread_of_a_part_lost": ("~pair(qx, q_sum if", "~pair(0.0 * qx, q_sum if"),
    "labels_of_the_first_part_alone": ("here = mask_of((column >= 0)", "here = mask_of((program == 0)"),
    "parts_overlap": ("end = tl.minimum(begin + SLICE,", "end = tl.minimum(begin + SLICE + GROUP,"),
    "parts_have_gaps": ("end = tl.minimum(begin + SLICE,", "end = tl.minimum(begin + SLICE - GROUP,"),
    "start_of_a_row_unmasked": (
        "first = tl.where(program == 0, BLOCK, begin)",
        "first = tl.where(program < 0, BLOCK, begin)",
    ),
    "label_of_a_part_not_subtracted": ("element_ty), mask=here)", "element_ty), mask=False)"),
    "label_weighed_as_the_first_class": ("tl.full([1], column, tl.int32)", "tl.full([1], 0 * column, tl.int32)"),
    "label_stored_by_the_places_of_logits": ("column + shift if WIDE_STORES else column", "column + shift"),
    "part_that_begins_behind_the_row": ("full = tl.maximum(first, tl.min", "full = tl.maximum(0, tl.min"),
    "gradient_at_the_label_of_raw_zero": ("tl.full([1], r, DTYPE)", "tl.full([1], 0.0, DTYPE)"),
    "rows_of_a_part_left_out": ("place % 3 * part", "place % 2 * part"),
    "loss_by_nobody": ("(column < 0) & (program == 0)", "(column < 0) & (program < 0)"),
}

TILE_MUTANTS = {
    "padded_classes_counted": (
        'mask=mask, other=float("-inf"), eviction_policy=EVICTION).to(DTYPE)',
        "mask=mask, other=0.0, eviction_policy=EVICTION).to(DTYPE)",
    ),
    "last_class_not_stored": (
        "inside = tile_mask(present, start, N_CLASSES,",
        "inside = tile_mask(present, start, N_CLASSES - 1,",
    ),
    "first_row_scales_every_row": (
        "dloss = tl.where(ignored, 0.0, tl.load(dloss_ptr + row * DLOSS_STRIDE).to(DTYPE))",
        "dloss = tl.where(ignored, 0.0, tl.load(dloss_ptr + 0 * row).to(DTYPE))",
    ),
    "every_group_is_the_first": ("outer = (tile // tiles)", "outer = (0 * tile)"),
    "ignored_rows_read": ('r if class_stride is None else tl.where(active[:, None], r, float("-inf"))', "r"),
    "gradient_by_the_strides_of_logits": ("out_stride = dlogits_class_stride", "out_stride = None"),
    "absent_rows_counted": ("rows = active if class_stride is None else present", "rows = active | True"),
    "argmax_of_the_last_step": ("largest > best, first +", "largest > -1e30, first +"),
    "ignored_rows_have_an_lse": ("d = tl.where(active, d, 1.0)", "d = d + 0.0"),
    "classes_of_a_thread_repeated": (
        "tl.arange(0, BLOCK)[:, None] * tl.num_programs(1)",
        "tl.arange(0, BLOCK)[:, None] * 0",
    ),
    "label_of_every_step": ("label_column - start, weight_ptr", "label_column % BLOCK, weight_ptr"),
    "running_sum_not_rescaled": KERNEL_MUTANTS["running_sum_not_rescaled"],
    "smoothing_missing_in_gradient": KERNEL_MUTANTS["smoothing_missing_in_gradient"],
}

RULE_MUTANTS = {
    "second_backward_doubled": ("torch.is_grad_enabled() or ctx.spent", "torch.is_grad_enabled()"),
}

DEVICE = "cuda" if HAS_GPU else "cpu"
BY_NAME = {case.name: case for case in CASES + LONG_CASES}
# Each kills at least one mutant. Labels out of range are NaN on every device only in JAX.
KILLERS = [
    (Torch("triton", DEVICE), BY_NAME[name])
    for name in (
        "classes_1025",
        "bfloat16_1",
        "all_options",
        "weight",
        "smoothing",
        "z_loss",
        "masked_tile",
        "soft_all_options",
        "soft_masked",
        "soft_shifted",
    )
] + [(Jax("triton", DEVICE), BY_NAME["invalid_labels"])]


@pytest.fixture(autouse=True)
def fresh_traces():
    """Traces hold the kernels that they were made with: none from before, none for later tests."""
    sharding._operation.cache_clear()
    yield
    sharding._operation.cache_clear()


def load_copy(module, edit, tmp_path, monkeypatch):
    """module's source after edit, imported under a name of its own."""
    path = tmp_path / f"{module.__name__.rpartition('.')[2]}.py"
    path.write_text(edit(Path(module.__file__).read_text()))
    spec = importlib.util.spec_from_file_location(f"mutant_{path.stem}", path)
    mutant = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, mutant)
    spec.loader.exec_module(mutant)
    return mutant


def load_kernels(old: str, new: str, tmp_path, monkeypatch):
    """The kernels, with one edit somewhere in their modules."""
    found = []

    def edit(source):
        found.append(old in source)
        # Each copy imports the copies before it.
        return re.sub(
            r"from ce_kernels\.(elements|statistics|merging|gradients|tiles)",
            r"from mutant_\1",
            source.replace(old, new),
        )

    modules = (elements, statistics, merging, gradients, tiles, kernels)
    *_, mutant = (load_copy(module, edit, tmp_path, monkeypatch) for module in modules)
    assert any(found), f"the mutant's text is no longer in the kernels: {old}"
    return mutant


def use(copy, monkeypatch):
    """Lets both front ends launch the kernels of this copy."""
    monkeypatch.setattr(ce_kernels, "kernels", copy)
    monkeypatch.setattr(launch, "kernel", lambda name: getattr(copy, name))


def holds(check, *arguments, **more) -> bool:
    try:
        check(*arguments, **more)
    except (AssertionError, InterpreterError):
        # The interpreter raises where a number is none.
        return False
    return True


def survives(frontend, case, reductions=("none", "mean"), **more) -> bool:
    return all(holds(check_case, frontend, case, reduction, **more) for reduction in reductions)


@pytest.mark.parametrize("name", KERNEL_MUTANTS)
def test_kernel_mutant_is_killed(one_row_a_program, name, tmp_path, monkeypatch):
    mutant = load_kernels(*KERNEL_MUTANTS[name], tmp_path, monkeypatch)
    use(mutant, monkeypatch)
    assert not all(survives(frontend, case) for frontend, case in KILLERS), f"mutant {name} survives"


@pytest.mark.parametrize("name", CLUSTER_MUTANTS)
def test_mutant_on_clusters_is_killed(clusters, name, tmp_path, monkeypatch):
    use(load_kernels(*CLUSTER_MUTANTS[name], tmp_path, monkeypatch), monkeypatch)
    frontend = Torch("triton", DEVICE)
    assert not all(survives(frontend, case) for case in LONG_CASES), f"mutant {name} survives"


@pytest.mark.parametrize("name", SHARED_MUTANTS)
def test_mutant_of_shared_rows_is_killed(shared_rows, name, tmp_path, monkeypatch):
    use(load_kernels(*SHARED_MUTANTS[name], tmp_path, monkeypatch), monkeypatch)
    killers = [(Torch("triton", DEVICE), case) for case in LONG_CASES]
    # In JAX, a gradient of class weights is no reason for two launches.
    killers.append((Jax("triton", DEVICE), BY_NAME["long_weight_smoothing"]))
    found = all(survives(frontend, case, ["mean"], with_dtarget=False) for frontend, case in killers)
    assert not (found and holds(check_rows_of_a_wider_buffer)), f"{name} survives"


def tiles_survive() -> bool:
    try:
        for reduction in ("none", "mean"):
            check_groups_of_rows((2, 21, 19), reduction)
            check_groups_of_rows((2, 100, 17), reduction, label_smoothing=0.1)
            check_groups_of_rows((7, 21), reduction)
        test_a_crop_and_its_gradient_have_strides_of_their_own()
        test_ignored_rows_have_no_lse()
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("name", TILE_MUTANTS)
def test_mutant_of_tiles_is_killed(small_tiles, name, tmp_path, monkeypatch):
    use(load_kernels(*TILE_MUTANTS[name], tmp_path, monkeypatch), monkeypatch)
    assert not tiles_survive(), f"mutant {name} survives"


def test_unmutated_kernels_survive(one_row_a_program, tmp_path, monkeypatch):
    copy = load_kernels("import triton\n", "import triton\n", tmp_path, monkeypatch)
    use(copy, monkeypatch)
    assert all(survives(frontend, case) for frontend, case in KILLERS)


def test_unmutated_tiles_survive(small_tiles, tmp_path, monkeypatch):
    use(load_kernels("import triton\n", "import triton\n", tmp_path, monkeypatch), monkeypatch)
    assert tiles_survive()


DIVISOR_MUTANTS = {
    "class_weights_ignored": ("valid = (labels >= 0)", "valid = (labels < 0)"),
    "invalid_labels_not_counted": (".to(total.dtype), mass)", ".to(total.dtype), 0.0)"),
    "first_block_alone": (
        "for start in tl.range(0, n, BLOCK):\n        rows = start + tl.arange(0, BLOCK)\n        labels",
        "for start in tl.range(0, 1, BLOCK):\n        rows = start + tl.arange(0, BLOCK)\n        labels",
    ),
    "ignored_labels_counted": ("counted &= labels != ignore_index", "counted &= labels == labels"),
}


def divisor_is_right(n_rows: int, weight_dtype: torch.dtype | None, ignore_index: int | None, label_dtype) -> bool:
    torch.manual_seed(0)
    logits = torch.zeros(1, 11, device=DEVICE)
    labels = torch.randint(0, 11, (n_rows,), device=DEVICE, dtype=label_dtype)
    labels[::3] = -100
    labels[::5] = 11  # no class
    weight = None if weight_dtype is None else torch.rand(11, device=DEVICE).to(weight_dtype)
    options = Options(ignore_index=ignore_index)
    found, expected = (
        reductions.label_mass(Inputs(logits, labels, weight), RowSpec(options, implementation), torch.float32)
        for implementation in ("triton", "reference")
    )
    return torch.allclose(found, expected, rtol=1e-5)


DIVISORS = [
    (1, torch.float32, -100, torch.int64),
    (8193, torch.float64, -100, torch.int64),
    (100, torch.bfloat16, None, torch.int32),
    (8193, None, -100, torch.int32),
]


@pytest.mark.parametrize("divisor", DIVISORS, ids=str)
def test_divisor_of_the_mean(divisor):
    assert divisor_is_right(*divisor)


@pytest.mark.parametrize("name", DIVISOR_MUTANTS)
def test_divisor_mutant_is_killed(name, tmp_path, monkeypatch):
    use(load_kernels(*DIVISOR_MUTANTS[name], tmp_path, monkeypatch), monkeypatch)
    assert not all(divisor_is_right(*divisor) for divisor in DIVISORS), f"mutant {name} survives"


def second_backward_is_exact() -> bool:
    logits = torch.linspace(-2, 2, 40, device=DEVICE).reshape(4, 10).requires_grad_()
    labels = torch.arange(4, device=DEVICE)
    loss = losses.cross_entropy(logits, labels, implementation="triton") * 3.0
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0].clone() for _ in range(2))
    # The second is computed anew, and rounds elsewhere.
    return torch.allclose(first, second, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", RULE_MUTANTS)
def test_rule_mutant_is_killed(name, tmp_path, monkeypatch):
    old, new = RULE_MUTANTS[name]
    assert old in Path(rules.__file__).read_text(), f"the mutant's text is no longer in the rules: {old}"
    mutant = load_copy(rules, lambda source: source.replace(old, new), tmp_path, monkeypatch)
    assert second_backward_is_exact()
    monkeypatch.setattr(losses, "FusedLoss", mutant.FusedLoss)
    assert not second_backward_is_exact(), f"mutant {name} survives"
