"""Pieces of the row kernels: what an element, a label and a row's place in memory are.

The formula stands in `ce_kernels.spec`. An argument that is None removes its code.

Exponents are base 2: one multiplication and one instruction for the exponential. In fp64 they stay base e, which rounds
less. `per_nat`, log₂e or 1, converts.

Rows that start between 16-byte boundaries (GROUPs of neighbouring columns) are walked from the boundary before them:
SHIFTED kernels count positions from there, column = position − shift, load whole groups, the neighbouring rows'
elements included, and select in registers; they store whole groups where the group lies inside the row.

This module imports triton, so nothing but a launch may import it.
"""

import math

import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.target_info import is_hip

LOG2E = tl.constexpr(math.log2(math.e))
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def overlap(OVERLAPPED: tl.constexpr):
    """Waits for the launch before, which may still run, and lets the next one begin, which will wait for this one."""
    if OVERLAPPED:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def leave_cluster(CLUSTER: tl.constexpr):
    """The last line of a program: ends it once all of its multiprocessors have read each other's shared memory.

    Triton ends it by a barrier that also waits for what was written to arrive in memory: 1 to 3 % of a training step.
    """
    if CLUSTER and not INTERPRETED:
        tl.inline_asm_elementwise(
            "mov.b32 $0, $1; barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned; exit;",
            "=r,r",
            [tl.full([], 0, tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def power(x):
    # libdevice's flushes subnormal results: tl.exp2 spends three of its five instructions on them.
    if x.dtype == tl.float64:
        return tl.exp(x)
    elif INTERPRETED:
        return tl.exp2(x)
    else:
        return libdevice.exp2(x)


@triton.jit
def reciprocal(x):
    # To 2 ulp, in two instructions instead of eight.
    if x.dtype == tl.float64 or INTERPRETED:
        return 1.0 / x
    else:
        return libdevice.fast_dividef(tl.full(x.shape, 1.0, x.dtype), x)


@triton.jit
def logarithm(x):
    return tl.log(x) if x.dtype == tl.float64 else tl.log2(x)


@triton.jit
def per_nat_of(DTYPE: tl.constexpr):
    return tl.full([], 1.0 if tl.float64 == DTYPE else LOG2E, DTYPE)


@triton.jit
def mask_of(condition):
    # The interpreter gives a scalar comparison its operands' type, which no load takes as a mask.
    return tl.where(condition, True, False)


@triton.jit
def scalar(value, DTYPE: tl.constexpr, SCALARS_IN_MEMORY: tl.constexpr):
    # Launch parameters hold floats as fp32; fp64 problems pass 0-d arrays instead.
    if value is None:
        return None
    else:
        if SCALARS_IN_MEMORY:
            value = tl.load(value)
        return tl.cast(value, DTYPE)


@triton.jit
def transform(r, logit_scale, softcap):
    """x = softcap·tanh(scale·r / softcap) and dx/dr. A masked class (−inf) stays masked."""
    x = r
    slope = tl.full(r.shape, 1.0, r.dtype)
    if logit_scale is not None:
        x = x * logit_scale
        slope = slope * logit_scale
    if softcap is not None:
        # tanh y = (1 − e)·w and sech² y = 4·e·w², which stays exact where tanh saturates. The limit keeps e·c finite.
        e = power(tl.minimum(x * (-2.0 * per_nat_of(x.dtype) / softcap), 100.0, propagate_nan=tl.PropagateNan.ALL))
        w = reciprocal(1.0 + e)
        slope = slope * (4.0 * (e * w) * w)
        x = tl.fma(e, -softcap, softcap) * w
    if logit_scale is not None or softcap is not None:
        masked = r == float("-inf")
        x = tl.where(masked, float("-inf"), x)
        if logit_scale is not None and softcap is not None:
            # 0·(−inf) is NaN.
            slope = tl.where(masked, 0.0, slope)
    return x, slope


@triton.jit
def row_target(
    row,
    logits_row_ptr,
    class_stride,
    target_ptr,
    weight_ptr,
    vocab_start_ptr,
    ignore_index,
    label_smoothing,
    logit_scale,
    softcap,
    begin,
    end,
    present,
    N_CLASSES: tl.constexpr,
    TOTAL_CLASSES: tl.constexpr,
    SOFT_TARGETS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """A hard label's column in [begin, end) of this slice, its mass in q, its x; is it ignored, is it invalid.

    The column is −2³⁰ where the label is elsewhere. Soft targets have no label: all their mass is spread. row may be
    many rows, of which some may not be present; None: all are.
    """
    if SOFT_TARGETS:
        zero = (row * 0).to(DTYPE)
        return (row * 0 - 2**30).to(tl.int32), zero, zero, row < 0, row < 0
    label = tl.load(target_ptr + row).to(tl.int64)
    column = label
    if vocab_start_ptr is not None:
        column = label - tl.load(vocab_start_ptr).to(tl.int64)
    # Read by the program that owns it alone: in place, another may have overwritten it.
    inside = (column >= 0) & (column < N_CLASSES) & (column >= begin) & (column < end)
    if present is not None:
        inside &= present
    safe = tl.where(inside, column, 0)
    mass = tl.where(inside, 1.0, 0.0).to(DTYPE)
    if label_smoothing is not None:
        mass = mass * (1.0 - label_smoothing)
    if weight_ptr is not None:
        mass = mass * tl.load(weight_ptr + safe).to(DTYPE)
    place = safe if class_stride is None else safe * class_stride
    x, _ = transform(tl.load(logits_row_ptr + place, mask=inside, other=0.0).to(DTYPE), logit_scale, softcap)
    ignored = label != label
    if ignore_index is not None:
        ignored = label == ignore_index
    invalid = (label < 0) | (label >= TOTAL_CLASSES)
    return tl.where(inside, column, -(2**30)).to(tl.int32), mass, x, ignored, invalid


@triton.jit
def uniform_mass(label_smoothing, weight_ptr, TOTAL_CLASSES: tl.constexpr, SOFT_TARGETS: tl.constexpr):
    """The spread mass where it is the same for every class: α/V. None where it is not, or where there is none."""
    if SOFT_TARGETS or label_smoothing is None or weight_ptr is not None:
        return None
    else:
        return label_smoothing / TOTAL_CLASSES


@triton.jit
def load_columns(ptr, cols, inside, EVICTION: tl.constexpr):
    """Entries of a row of targets or class weights; 0 where not inside. None: all are, and no mask slows the load."""
    if inside is None:
        return tl.load(ptr + cols, eviction_policy=EVICTION)
    else:
        return tl.load(ptr + cols, mask=inside, other=0.0, eviction_policy=EVICTION)


@triton.jit
def spread_mass(t, cols, inside, weight_ptr, label_smoothing, TOTAL_CLASSES: tl.constexpr, DTYPE: tl.constexpr):
    """q without a hard label's own mass: w·((1−α)·t + α/V), where t is None for hard labels; 0 where not inside."""
    q = tl.zeros(cols.shape, DTYPE) if t is None else t
    if label_smoothing is not None:
        q = (1.0 - label_smoothing) * q + label_smoothing / TOTAL_CLASSES
    if weight_ptr is not None:
        q = q * load_columns(weight_ptr, cols, inside, "").to(DTYPE)
    return q if inside is None else tl.where(inside, q, 0.0)


@triton.jit
def mixed(place, n):
    """Which of n rows is taken at this place, so that rows of three parts are under way together.

    Where a run of rows is ignored, whose gradient is written and nothing read, others are read meanwhile.
    """
    part = n // 3
    return tl.where(place < part * 3, place % 3 * part + place // 3, place)


@triton.jit
def row_offset(row, STRIDE: tl.constexpr, rows_inner, outer_stride):
    """Where a row starts. With rows_inner, rows lie in two levels, as those of logits[:, :-1] do in [B, T, V]."""
    if rows_inner is None:
        return row * STRIDE
    else:
        return (row // rows_inner) * outer_stride + (row % rows_inner) * STRIDE


@triton.jit
def aligned(offset, GROUP: tl.constexpr, SHIFTED: tl.constexpr):
    """The 16-byte boundary at or before a row that starts at offset, and the columns from there to the row."""
    if SHIFTED:
        start = offset // GROUP * GROUP
        return start, (offset - start).to(tl.int32)
    else:
        return offset, tl.cast(0, tl.int32)


@triton.jit
def widen(r, SHIFTED: tl.constexpr, DTYPE: tl.constexpr):
    """Logits as numbers to compute with."""
    if (r.dtype == tl.bfloat16 and not SHIFTED) and not (INTERPRETED or is_hip()):
        # An instruction an element instead of one and a half. Shifted rows want the registers that this takes.
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [r], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        return r.to(DTYPE)


@triton.jit
def load_logits(
    row_ptr,
    start,
    shift,
    end,
    active,
    EDGE: tl.constexpr,
    EVICTION: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFTED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """A block of raw logits. An EDGE block may reach over positions [shift, end): −inf there, and where not active.

    Other blocks load without a mask, which is 5 to 10 % faster, and ask nothing of active.
    """
    position = start + tl.arange(0, BLOCK)
    if not EDGE:
        return widen(tl.load(row_ptr + position, eviction_policy=EVICTION), SHIFTED, DTYPE)
    else:
        # Uniform over each group, or every load would be of one element.
        mask = active & ((position // GROUP * GROUP if SHIFTED else position) < end)
        r = tl.load(row_ptr + position, mask=mask, other=float("-inf"), eviction_policy=EVICTION)
        r = widen(r, SHIFTED, DTYPE)
        if SHIFTED:
            r = tl.where((position >= shift) & (position < end), r, float("-inf"))
        return r


@triton.jit
def load_targets(
    row_ptr,
    start,
    shift,
    end,
    active,
    EDGE: tl.constexpr,
    EVICTION: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFTED: tl.constexpr,
    WIDE_TARGETS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Soft targets of a block of logits. WIDE_TARGETS: by groups, of which an EDGE block's may reach over the row."""
    position = start + tl.arange(0, BLOCK)
    cols = position - shift
    if WIDE_TARGETS:
        # At most 16 bytes, as beyond them may be what is not ours to read.
        UNIT: tl.constexpr = min(GROUP, 128 // row_ptr.dtype.element_ty.primitive_bitwidth)
        mask = active & (position // UNIT * UNIT < end) if EDGE else None
        t = load_columns(row_ptr, position, mask, EVICTION)
    else:
        t = load_columns(row_ptr, cols, active & (cols >= 0) & (cols < end - shift) if EDGE else None, EVICTION)
    return widen(t, SHIFTED, DTYPE)
