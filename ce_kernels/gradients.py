"""The second pass over a row: `store_gradient_block`, the derivative of the loss by logits and soft targets.

Here, over the pieces of `ce_kernels.elements`, the derivative of `ce_kernels.spec` is computed, and nowhere else.
This module imports triton, so nothing but a launch may import it.
"""

import triton
import triton.language as tl

from ce_kernels.elements import (
    load_logits,
    load_targets,
    mask_of,
    per_nat_of,
    power,
    spread_mass,
    transform,
    uniform_mass,
)


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
