"""Passes over a row: `row_statistics` (loss and lse) and `store_gradient_block` (their derivative).

Here, over the pieces of `ce_kernels.elements`, the formula of `ce_kernels.spec` is computed, and nowhere else.
This module imports triton, so nothing but a launch may import it.
"""

import triton
import triton.language as tl

from ce_kernels.elements import (
    INTERPRETED,
    load_logits,
    load_targets,
    logarithm,
    mask_of,
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
def merge(m, d, other_m, other_d):
    """The maximum and the sum of exponentials above it of two groups together."""
    larger = tl.maximum(m, other_m)
    per_nat = per_nat_of(m.dtype)
    shift_by = tl.where(larger == float("-inf"), 0.0, larger)
    return larger, d * power((m - shift_by) * per_nat) + other_d * power((other_m - shift_by) * per_nat)


@triton.jit
def merge_spread(m, d, qx, q_sum, other_m, other_d, other_qx, other_q_sum):
    m, d = merge(m, d, other_m, other_d)
    return m, d, qx + other_qx, q_sum + other_q_sum


@triton.jit
def add_two(a, b, other_a, other_b):
    return a + other_a, b + other_b


@triton.jit
def add_three(a, b, c, other_a, other_b, other_c):
    return a + other_a, b + other_b, c + other_c


@triton.jit
def pair(high, low):
    """Two fp32 numbers as one of 64 bits."""
    return (high.to(tl.int32, bitcast=True).to(tl.int64) << 32) | low.to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def unpaired(numbers):
    return (numbers >> 32).to(tl.int32).to(tl.float32, bitcast=True), numbers.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def addend(x):
    """A number that `merge_pairs` adds: paired with −1, which no sum of exponentials is."""
    return pair(x, tl.full(x.shape, -1.0, x.dtype))


@triton.jit
def merge_pairs(one, other):
    """`merge` of pairs (m, d), and the sum of `addend`s."""
    high, low = unpaired(one)
    other_high, other_low = unpaired(other)
    m, d = merge(high, low, other_high, other_low)
    return tl.where(low < 0, addend(high + other_high), pair(m, d))


@triton.jit
def merge_clusters(m, d, qx, q_sum, uniform, SPREAD: tl.constexpr):
    """`merge_groups` over multiprocessors, which wait for one another for every array that is reduced: for one."""
    if m.dtype == tl.float64:
        m, d, qx, q_sum = tl.reduce((m, d, qx, q_sum), 0, merge_spread)
    elif not SPREAD:
        m, d = unpaired(tl.reduce(pair(m, d), 0, merge_pairs))
    elif uniform is not None:
        md, qx = tl.split(tl.reduce(tl.join(pair(m, d), addend(qx)), 0, merge_pairs))
        m, d = unpaired(md)
        qx, _ = unpaired(qx)
    else:
        # join takes two at a time.
        q_sum = addend(q_sum)
        columns = tl.join(tl.join(pair(m, d), addend(qx)), tl.join(q_sum, q_sum))
        left, right = tl.split(tl.reduce(columns, 0, merge_pairs))
        md, qx = tl.split(left)
        q_sum, _ = tl.split(right)
        m, d = unpaired(md)
        qx, _ = unpaired(qx)
        q_sum, _ = unpaired(q_sum)
    return m, d, qx, q_sum


@triton.jit
def merge_groups(m, d, qx, q_sum, uniform, SPREAD: tl.constexpr, CLUSTER: tl.constexpr):
    """A row's maximum (0 where all is −inf), sum of exponentials above it, Σqx and Σq from those of its groups.

    Σq only where no uniform mass makes it known.
    """
    if CLUSTER:
        m, d, qx, q_sum = merge_clusters(m, d, qx, q_sum, uniform, SPREAD)
        m_row = tl.where(m == float("-inf"), 0.0, m)
    else:
        m_row = tl.max(m, axis=0)
        m_row = tl.where(m_row == float("-inf"), 0.0, m_row)
        d = d * power((m - m_row) * per_nat_of(m.dtype))
        # Together: every reduction has its barriers.
        if not SPREAD:
            d = tl.sum(d, axis=0)
        elif uniform is not None:
            d, qx = tl.reduce((d, qx), 0, add_two)
        else:
            d, qx, q_sum = tl.reduce((d, qx, q_sum), 0, add_three)
    return m_row, d, qx, q_sum


@triton.jit
def publish(m, d, qx, q_sum, uniform, exchange_ptr, row, program, SPREAD: tl.constexpr, PROGRAMS: tl.constexpr):
    """Tells the other programs what `merge_groups` found in this one's part of a row.

    exchange_ptr: zeros before the launch, [N, PROGRAMS] words of 64 bits, or twice as many where q is SPREAD; what is
    written is inverted, as 0 says that there is nothing yet. Words are whole by themselves, so that nothing is ordered:
    a barrier of a cluster or an acquire would empty L1, from where the second pass reads.
    """
    WORDS: tl.constexpr = 2 if SPREAD else 1
    mine = exchange_ptr.to(tl.pointer_type(tl.int64)) + (row * PROGRAMS + program) * WORDS
    # A part of only −inf has no maximum.
    tl.atomic_xchg(mine, ~pair(tl.where(d == 0, float("-inf"), m), d), sem="relaxed")
    if SPREAD:
        tl.atomic_xchg(mine + 1, ~pair(qx, q_sum if uniform is None else tl.cast(0.0, d.dtype)), sem="relaxed")


@triton.jit
def ask(ptrs, there, ALL: tl.constexpr):
    """Published words: 0 where there is none yet, and 1 where there will be none."""
    if ALL:
        return tl.atomic_add(ptrs, 0, sem="relaxed")
    else:
        return tl.where(there, tl.atomic_add(ptrs, 0, mask=there, sem="relaxed"), 1)


@triton.jit
def collect(qx, q_sum, uniform, exchange_ptr, row, SPREAD: tl.constexpr, PROGRAMS: tl.constexpr):
    """`merge_groups` over all programs that share a row, once they have published.

    They wait for those beside them only, and a GPU starts programs in order: whoever waits, waits for one that runs or
    that runs next.
    """
    WORDS: tl.constexpr = 2 if SPREAD else 1
    # As `tl.arange` wants it.
    POWER_OF_TWO: tl.constexpr = triton.next_power_of_2(PROGRAMS)
    row_ptr = exchange_ptr.to(tl.pointer_type(tl.int64)) + row * (PROGRAMS * WORDS)
    place = tl.arange(0, POWER_OF_TWO * WORDS)
    there = place < PROGRAMS * WORDS
    words = ask(row_ptr + place, there, POWER_OF_TWO == PROGRAMS)
    # The interpreter's programs run one after the other: `ce_kernels.interpreter` runs them twice.
    if not INTERPRETED:
        while tl.min((words != 0).to(tl.int32), axis=0) == 0:
            words = ask(row_ptr + place, there, POWER_OF_TWO == PROGRAMS)
    if SPREAD:
        md, q = tl.split(tl.reshape(~words, [POWER_OF_TWO, 2]))
        m, d = unpaired(md)
        qx, q_sum = unpaired(q)
    else:
        m, d = unpaired(~words)
    if POWER_OF_TWO > PROGRAMS:
        there = tl.arange(0, POWER_OF_TWO) < PROGRAMS
        m, d = tl.where(there, m, float("-inf")), tl.where(there, d, 0.0)
        if SPREAD:
            qx, q_sum = tl.where(there, qx, 0.0), tl.where(there, q_sum, 0.0)
    return merge_groups(m, d, qx, q_sum, uniform, SPREAD, False)


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


@triton.jit
def upstream(lse, s, dloss, dlse, z_loss):
    """a = dloss·(s + 2λ·lse) + dlse of dx = a·p − dloss·q, and whether the row has an upstream gradient at all."""
    a = s
    if z_loss is not None:
        a = a + 2.0 * z_loss * lse
    a = tl.where(dloss == 0, 0.0, dloss * a)
    if dlse is not None:
        a = a + dlse
    return a, mask_of((a != 0) | (dloss != 0))


@triton.jit
def store_block(
    row_ptr,
    values,
    start,
    shift,
    end,
    EDGE: tl.constexpr,
    WIDE_STORES: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    """Writes what of a block lies in positions [shift, end): by whole groups where WIDE_STORES says that they align."""
    position = start + tl.arange(0, BLOCK)
    cols = position - shift
    inside = (cols >= 0) & (cols < end - shift)
    ptrs = row_ptr + (position if WIDE_STORES else cols)
    if not EDGE:
        tl.store(ptrs, values, cache_modifier=".cs")
    elif SHIFTED and WIDE_STORES:
        # The parts of groups at the row's two ends one by one.
        group = position // GROUP * GROUP
        whole = (group >= shift) & (group + GROUP <= end)
        tl.store(ptrs, values, mask=whole, cache_modifier=".cs")
        tl.store(ptrs, values, mask=inside & ~whole)
    else:
        tl.store(ptrs, values, mask=inside, cache_modifier=".cs")


@triton.jit
def gradient(
    r,
    t,
    cols,
    inside,
    label_place,
    weight_ptr,
    label_mass,
    a,
    dloss,
    lse,
    label_smoothing,
    logit_scale,
    softcap,
    TOTAL_CLASSES: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """dlogits_k = slope_k·(a·p_k − b·q_k) of raw logits r and soft targets t or None, with b = dloss.

    A masked class has none.

    label_mass, a, dloss and lse are a row's, or columns of many rows'. label_place: the label's column, counted from
    the first; by groups as in `accumulate`, since a comparison of whole columns takes one instruction more. None where
    it is not among them, or is written by `store_label_gradient`.
    """
    x, slope = transform(r, logit_scale, softcap)
    # p in one multiply-add before the exponential; a takes what the product with lse is rounded by. Where that would
    # overflow, neighbouring numbers are so far apart that p is 1 or 0 in any base.
    per_nat = per_nat_of(DTYPE)
    far = tl.abs(lse * per_nat) >= 2.0**31
    factor = tl.where(far, 1.0, per_nat)
    lse_high = lse * factor
    lse_low = tl.where(far, 0.0, tl.fma(lse, factor, -lse_high))
    dx = a * power(-lse_low) * power(tl.fma(x, factor, -lse_high))
    if t is None and label_place is not None:
        label_place = label_place - tl.arange(0, GROUPS) * STEP
        is_label = tl.reshape(label_place[:, None] == tl.arange(0, GROUP)[None, :], r.shape)
        dx = tl.where(is_label, dx - dloss * label_mass, dx)
    uniform = uniform_mass(label_smoothing, weight_ptr, TOTAL_CLASSES, t is not None)
    if uniform is not None:
        dx = tl.where(x == float("-inf"), dx, dx - dloss * uniform)
    elif t is not None or label_smoothing is not None:
        q = spread_mass(t, cols, inside, weight_ptr, label_smoothing, TOTAL_CLASSES, DTYPE)
        dx = tl.fma(tl.where(x == float("-inf"), 0.0, -dloss), q, dx)
    if logit_scale is not None or softcap is not None:
        dx = dx * slope
    return dx


@triton.jit
def store_target_gradient(
    r,
    cols,
    inside,
    dtarget_row_ptr,
    weight_ptr,
    dloss,
    lse,
    label_smoothing,
    logit_scale,
    softcap,
    DTYPE: tl.constexpr,
):
    """dtarget_k = b·(1−α)·w_k·(lse − x_k), with b = dloss."""
    x, _ = transform(r, logit_scale, softcap)
    mass = tl.zeros(r.shape, DTYPE) + dloss
    if label_smoothing is not None:
        mass = mass * (1.0 - label_smoothing)
    if weight_ptr is not None:
        mass = mass * tl.load(weight_ptr + cols, mask=inside, other=0.0).to(DTYPE)
    dt = tl.where(mass != 0, mass * (lse - x), 0.0)
    tl.store(dtarget_row_ptr + cols, dt.to(dtarget_row_ptr.dtype.element_ty), mask=inside)


@triton.jit
def store_gradient_block(
    start,
    logits_row_ptr,
    target_row_ptr,
    weight_ptr,
    shift,
    end,
    active,
    label_column,
    label_mass,
    a,
    dloss,
    lse,
    label_smoothing,
    logit_scale,
    softcap,
    dlogits_row_ptr,
    dtarget_row_ptr,
    EDGE: tl.constexpr,
    TOTAL_CLASSES: tl.constexpr,
    SOFT_TARGETS: tl.constexpr,
    WIDE_STORES: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFTED: tl.constexpr,
    WIDE_TARGETS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Writes dlogits, and dtarget where there is a pointer to it, of a block of a row.

    A row without upstream gradient (not active) is not read; its gradient is 0 whatever it holds. Blocks that are no
    EDGE must be of active rows.
    """
    cols = start + tl.arange(0, BLOCK) - shift
    inside = (cols >= 0) & (cols < end - shift)
    r = load_logits(logits_row_ptr, start, shift, end, active, EDGE, "evict_first", BLOCK, GROUP, SHIFTED, DTYPE)
    t = None
    if SOFT_TARGETS:
        t = load_targets(
            target_row_ptr, start, shift, end, active, EDGE, "evict_first", BLOCK, GROUP, SHIFTED, WIDE_TARGETS, DTYPE
        )
    label_place = None if label_column is None else label_column + shift - start
    dx = gradient(
        r, t, cols, inside & active if EDGE else None, label_place, weight_ptr, label_mass, a, dloss, lse,
        label_smoothing, logit_scale, softcap, TOTAL_CLASSES, BLOCK // GROUP, GROUP, GROUP, DTYPE,
    )  # fmt: skip
    dlogits = dx.to(dlogits_row_ptr.dtype.element_ty)
    store_block(dlogits_row_ptr, dlogits, start, shift, end, EDGE, WIDE_STORES, BLOCK, GROUP, SHIFTED)
    if dtarget_row_ptr is not None:
        store_target_gradient(
            r, cols, inside, dtarget_row_ptr, weight_ptr, dloss, lse, label_smoothing, logit_scale, softcap, DTYPE
        )


@triton.jit
def store_label_gradient(
    r,
    column,
    here,
    weight_ptr,
    label_mass,
    a,
    dloss,
    lse,
    label_smoothing,
    logit_scale,
    softcap,
    ptr,
    TOTAL_CLASSES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Writes dlogits of a hard label's column, whose raw logit is r, where it is here."""
    dx = gradient(
        tl.full([1], r, DTYPE), None, tl.full([1], column, tl.int32), here, 0, weight_ptr, label_mass, a, dloss, lse,
        label_smoothing, logit_scale, softcap, TOTAL_CLASSES, 1, 1, 1, DTYPE,
    )  # fmt: skip
    tl.store(ptr + tl.arange(0, 1), dx.to(ptr.dtype.element_ty), mask=here)
