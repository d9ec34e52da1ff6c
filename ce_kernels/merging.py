"""Statistics of a row's groups become those of the row: in a program, over a cluster, over programs that share the row.

This module imports triton, so nothing but a launch may import it.
"""

import triton
import triton.language as tl

from ce_kernels.elements import (
    INTERPRETED,
    per_nat_of,
    power,
)


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
