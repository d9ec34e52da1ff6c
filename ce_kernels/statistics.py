"""The first pass over a row: `row_statistics`, from which `store_statistics` makes loss and lse.

Here, over the pieces of `ce_kernels.elements`, the loss of `ce_kernels.spec` is computed, and nowhere else.
This module imports triton, so nothing but a launch may import it.
"""

import triton
import triton.language as tl

from ce_kernels.elements import (
    load_logits,
    load_targets,
    logarithm,
    per_nat_of,
    power,
    spread_mass,
    transform,
    uniform_mass,
)


@triton.jit
def accumulate(
    m, d, qx, q_sum, best, best_col,
    r,
    t,
    cols,
    inside,
    first,
    weight_ptr,
    label_smoothing,
    logit_scale,
    softcap,
    WITH_ARGMAX: tl.constexpr,
    TOTAL_CLASSES: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: the running values of GROUPS groups, each after GROUP more of its raw logits r.

    The maximum m of x and the sum d of exp(x − m) run per group: 1 + 1/GROUP exponentials an element (after Milakov &
    Gimelshein 2018). A group is one thread's part of a row, so that no step synchronises, or a row of a tile.
    t: soft targets, or None. cols: the columns of r and t, from first; from group to group they are STEP apart. inside:
    where they are read; None: all.
    """
    per_nat = per_nat_of(DTYPE)
    x, _ = transform(r, logit_scale, softcap)
    grouped = tl.reshape(x, [GROUPS, GROUP])
    m_new = tl.maximum(m, tl.max(grouped, axis=1))
    # A group of only −inf must not make −inf − (−inf) = NaN.
    shift_by = tl.where(m_new == float("-inf"), 0.0, m_new)
    d = d * power((m - shift_by) * per_nat) + tl.sum(power((grouped - shift_by[:, None]) * per_nat), axis=1)
    if uniform_mass(label_smoothing, weight_ptr, TOTAL_CLASSES, t is not None) is not None:
        # Σx is enough.
        x = x if inside is None else tl.where(inside, x, 0.0)
        qx += tl.sum(tl.reshape(x, [GROUPS, GROUP]), axis=1)
    elif t is not None or label_smoothing is not None:
        q = spread_mass(t, cols, inside, weight_ptr, label_smoothing, TOTAL_CLASSES, DTYPE)
        qx += tl.sum(tl.reshape(tl.where(q != 0, q * x, 0.0), [GROUPS, GROUP]), axis=1)
        q_sum += tl.sum(tl.reshape(q, [GROUPS, GROUP]), axis=1)
    if WITH_ARGMAX:
        # Before the soft cap, which rounds large logits to ties; NaN counts as the largest.
        key, _ = transform(r, logit_scale, None)
        key = tl.reshape(tl.where(key != key, float("inf"), key), [GROUPS, GROUP])
        largest, where = tl.max(key, axis=1, return_indices=True)
        best_col = tl.where(largest > best, first + tl.arange(0, GROUPS) * STEP + where, best_col)
        best = tl.maximum(best, largest)
    return m_new, d, qx, q_sum, best, best_col


@triton.jit
def statistics_block(
    m, d, qx, q_sum, best, best_col,
    start,
    logits_row_ptr,
    target_row_ptr,
    weight_ptr,
    shift,
    end,
    active,
    label_smoothing,
    logit_scale,
    softcap,
    WITH_ARGMAX: tl.constexpr,
    EDGE: tl.constexpr,
    EVICTION: tl.constexpr,
    TOTAL_CLASSES: tl.constexpr,
    SOFT_TARGETS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFTED: tl.constexpr,
    WIDE_TARGETS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """`accumulate` of one more block of a row, whose groups are GROUP neighbouring columns each."""
    r = load_logits(logits_row_ptr, start, shift, end, active, EDGE, EVICTION, BLOCK, GROUP, SHIFTED, DTYPE)
    t = None
    if SOFT_TARGETS:
        t = load_targets(
            target_row_ptr, start, shift, end, active, EDGE, EVICTION, BLOCK, GROUP, SHIFTED, WIDE_TARGETS, DTYPE
        )
    cols = start + tl.arange(0, BLOCK) - shift
    return accumulate(
        m, d, qx, q_sum, best, best_col, r, t, cols, active & (cols >= 0) & (cols < end - shift) if EDGE else None,
        start - shift, weight_ptr, label_smoothing, logit_scale, softcap, WITH_ARGMAX, TOTAL_CLASSES, BLOCK // GROUP,
        GROUP, GROUP, DTYPE,
    )  # fmt: skip


@triton.jit
def row_statistics(
    logits_row_ptr,
    target_row_ptr,
    weight_ptr,
    shift,
    begin,
    first,
    full,
    stop,
    end,
    active,
    label_smoothing,
    logit_scale,
    softcap,
    WITH_ARGMAX: tl.constexpr,
    EVICTION: tl.constexpr,
    TOTAL_CLASSES: tl.constexpr,
    SOFT_TARGETS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFTED: tl.constexpr,
    WIDE_TARGETS: tl.constexpr,
    UNROLL: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The running values of `statistics_block` after positions [begin, end) of a row; not read where not active.

    Whole blocks are those of [first, full), EDGE blocks the one before them, if any, and those of [full, stop).
    """
    m = tl.full([BLOCK // GROUP], float("-inf"), DTYPE)
    d = tl.zeros([BLOCK // GROUP], DTYPE)
    qx = tl.zeros([BLOCK // GROUP], DTYPE)
    q_sum = tl.zeros([BLOCK // GROUP], DTYPE)
    best = tl.full([BLOCK // GROUP], float("-inf"), DTYPE)
    best_col = tl.zeros([BLOCK // GROUP], tl.int32)
    if SHIFTED:  # noqa: SIM102 (known when compiling, then not)
        if begin < first:
            m, d, qx, q_sum, best, best_col = statistics_block(
                m, d, qx, q_sum, best, best_col, begin, logits_row_ptr, target_row_ptr, weight_ptr, shift, end, active,
                label_smoothing, logit_scale, softcap, WITH_ARGMAX, True, EVICTION, TOTAL_CLASSES, SOFT_TARGETS, BLOCK,
                GROUP, SHIFTED, WIDE_TARGETS, DTYPE,
            )  # fmt: skip
    # An end unknown to the compiler: with a known one it unrolls whole rows here, whose loads then hold all registers.
    # It must not be below the start either: the trip count of an unrolled loop is unsigned.
    for start in tl.range(first, tl.where(active, full, first), BLOCK, loop_unroll_factor=UNROLL):
        m, d, qx, q_sum, best, best_col = statistics_block(
            m, d, qx, q_sum, best, best_col, start, logits_row_ptr, target_row_ptr, weight_ptr, shift, end, active,
            label_smoothing, logit_scale, softcap, WITH_ARGMAX, False, EVICTION, TOTAL_CLASSES, SOFT_TARGETS, BLOCK,
            GROUP, SHIFTED, WIDE_TARGETS, DTYPE,
        )  # fmt: skip
    for start in tl.range(full, stop, BLOCK):
        m, d, qx, q_sum, best, best_col = statistics_block(
            m, d, qx, q_sum, best, best_col, start, logits_row_ptr, target_row_ptr, weight_ptr, shift, end, active,
            label_smoothing, logit_scale, softcap, WITH_ARGMAX, True, EVICTION, TOTAL_CLASSES, SOFT_TARGETS, BLOCK,
            GROUP, SHIFTED, WIDE_TARGETS, DTYPE,
        )  # fmt: skip
    return m, d, qx, q_sum, best, best_col


@triton.jit
def store_ignored_row(row, loss_ptr, lse_ptr, target_sum_ptr):
    tl.store(loss_ptr + row, 0.0)
    tl.store(lse_ptr + row, 0.0)
    tl.store(target_sum_ptr + row, 0.0)


@triton.jit
def first_of_best(best, best_col, N_CLASSES: tl.constexpr):
    """A row's argmax from those of its groups."""
    is_best = best == tl.max(best, axis=0)
    return tl.min(tl.where(is_best, best_col, N_CLASSES - 1), axis=0)


@triton.jit
def store_statistics(
    m, d, qx, q_sum,
    row,
    present,
    label_mass,
    label_x,
    ignored,
    invalid,
    uniform,
    z_loss,
    loss_ptr,
    lse_ptr,
    target_sum_ptr,
    SPREAD: tl.constexpr,
    N_CLASSES: tl.constexpr,
):  # fmt: skip
    """Writes loss, lse and s = Σq of a row, or of many, from maximum, sum of exponentials above it, Σqx and Σq.

    Where there is a uniform mass, qx holds Σx instead of Σq·x. present: which rows there are; None: all.
    Returns lse and s.
    """
    log_d = logarithm(d) / per_nat_of(d.dtype)
    s = label_mass
    # Against the row's maximum first: a confident row keeps its small loss.
    loss = tl.where(label_mass != 0, label_mass * (m - label_x), 0.0)
    if uniform is not None:
        spread = N_CLASSES * uniform
        s = s + spread
        loss += spread * m - uniform * qx
    elif SPREAD:
        s = s + q_sum
        loss += q_sum * m - qx
    loss += tl.where(s != 0, s * log_d, 0.0)
    lse = m + log_d
    if z_loss is not None:
        loss += z_loss * lse * lse
    loss = tl.where(ignored, 0.0, tl.where(invalid, float("nan"), loss))
    s = tl.where(ignored, 0.0, tl.where(invalid, float("nan"), s))
    tl.store(loss_ptr + row, loss, mask=present)
    tl.store(lse_ptr + row, lse, mask=present)
    tl.store(target_sum_ptr + row, s, mask=present)
    return lse, s
