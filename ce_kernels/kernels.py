"""The Triton kernels: three row operations, one program per row.

    cross_entropy_stats_kernel   loss, lse, Σq (and argmax)        one read of the logits
    cross_entropy_grad_kernel    dlogits (and dtarget) from lse    one read, one write
    cross_entropy_fused_kernel   both in one launch                one read from memory, one meant for L2, one write

The formula they compute stands in `ce_kernels.spec`; here it is `_row_statistics` (loss and lse) and `_store_gradient`
(their derivative), and nowhere else. An argument that is None removes its code. A row may be a slice of the
vocabulary that starts at `vocab_start`; slices merge by lse = log Σ exp(lse_j), loss = Σ loss_j + s_j·(lse − lse_j).

This module imports triton, so nothing but a launch may import it.
"""

import triton
import triton.language as tl


@triton.jit
def _row_offset(row, STRIDE: tl.constexpr, rows_inner, outer_stride):
    """Where a row starts. With rows_inner, rows lie in two levels, as those of logits[:, :-1] do in [B, T, V]."""
    if rows_inner is None:
        return row * STRIDE
    else:
        return (row // rows_inner) * outer_stride + (row % rows_inner) * STRIDE


@triton.jit
def _scalar(value, DTYPE: tl.constexpr, SCALARS_IN_MEMORY: tl.constexpr):
    # Launch parameters hold floats as fp32; fp64 problems pass 0-d arrays instead.
    if value is None:
        return None
    else:
        if SCALARS_IN_MEMORY:
            value = tl.load(value)
        return tl.cast(value, DTYPE)


@triton.jit
def _transform(r, logit_scale, softcap):
    """x = softcap·tanh(scale·r / softcap) and dx/dr. A masked class (−inf) stays masked."""
    x = r
    slope = tl.full(r.shape, 1.0, r.dtype)
    if logit_scale is not None:
        x = x * logit_scale
        slope = slope * logit_scale
    if softcap is not None:
        # exp of a non-positive number only: no overflow, and sech² keeps its relative precision where tanh saturates.
        e = tl.exp(-2.0 * tl.abs(x / softcap))
        tanh = (1.0 - e) / (1.0 + e)
        slope = slope * (4.0 * e / ((1.0 + e) * (1.0 + e)))
        x = softcap * tl.where(x < 0, -tanh, tanh)
    if logit_scale is not None or softcap is not None:
        masked = r == float("-inf")
        x = tl.where(masked, float("-inf"), x)
        slope = tl.where(masked, 0.0, slope)
    return x, slope


@triton.jit
def _row_target(
    row,
    logits_row_ptr,
    target_ptr,
    weight_ptr,
    vocab_start_ptr,
    ignore_index,
    label_smoothing,
    logit_scale,
    softcap,
    N_CLASSES: tl.constexpr,
    TOTAL_CLASSES: tl.constexpr,
    SOFT_TARGETS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """A hard label's column in this slice (−1: elsewhere), its mass in q, its x; is it ignored, is it invalid.

    Soft targets have no such label: all their mass is spread.
    """
    if SOFT_TARGETS:
        zero = tl.cast(0.0, DTYPE)
        return tl.cast(-1, tl.int32), zero, zero, row < 0, row < 0
    label = tl.load(target_ptr + row).to(tl.int64)
    column = label
    if vocab_start_ptr is not None:
        column = label - tl.load(vocab_start_ptr).to(tl.int64)
    inside = (column >= 0) & (column < N_CLASSES)
    safe = tl.where(inside, column, 0)
    mass = tl.where(inside, 1.0, 0.0).to(DTYPE)
    if label_smoothing is not None:
        mass = mass * (1.0 - label_smoothing)
    if weight_ptr is not None:
        mass = mass * tl.load(weight_ptr + safe).to(DTYPE)
    x, _ = _transform(tl.load(logits_row_ptr + safe).to(DTYPE), logit_scale, softcap)
    ignored = label != label
    if ignore_index is not None:
        ignored = label == ignore_index
    invalid = (label < 0) | (label >= TOTAL_CLASSES)
    return tl.where(inside, column, -1).to(tl.int32), mass, x, ignored, invalid


@triton.jit
def _spread_mass(
    cols,
    mask,
    target_row_ptr,
    weight_ptr,
    label_smoothing,
    TOTAL_CLASSES: tl.constexpr,
    SOFT_TARGETS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """q without a hard label's own mass: w·((1−α)·t + α/V), where t = 0 for hard labels."""
    q = tl.zeros(cols.shape, DTYPE)
    if SOFT_TARGETS:
        q += tl.load(target_row_ptr + cols, mask=mask, other=0.0).to(DTYPE)
    if label_smoothing is not None:
        q = (1.0 - label_smoothing) * q + label_smoothing / TOTAL_CLASSES
    if weight_ptr is not None:
        q = q * tl.load(weight_ptr + cols, mask=mask, other=0.0).to(DTYPE)
    return tl.where(mask, q, 0.0)


@triton.jit
def _row_statistics(
    logits_row_ptr,
    target_row_ptr,
    weight_ptr,
    label_mass,
    label_x,
    label_smoothing,
    logit_scale,
    softcap,
    n_read,
    WITH_ARGMAX: tl.constexpr,
    EVICTION: tl.constexpr,
    N_CLASSES: tl.constexpr,
    TOTAL_CLASSES: tl.constexpr,
    SOFT_TARGETS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """loss (without z-loss), lse, s = Σq and argmax over the first n_read columns: all of them, or 0 to skip the row.

    Maximum m and sum d of exp(x − m) run per group of GROUP neighbouring columns, which one thread holds, so that no
    iteration synchronises the block: 1 + 1/GROUP exponentials an element (after Milakov & Gimelshein 2018).
    """
    SPREAD: tl.constexpr = SOFT_TARGETS or label_smoothing is not None
    GROUPS: tl.constexpr = BLOCK // GROUP
    m = tl.full([GROUPS], float("-inf"), DTYPE)
    d = tl.zeros([GROUPS], DTYPE)
    qx = tl.zeros([GROUPS], DTYPE)
    q_sum = tl.zeros([GROUPS], DTYPE)
    best = tl.full([GROUPS], float("-inf"), DTYPE)
    best_col = tl.zeros([GROUPS], tl.int32)
    for start in tl.range(0, n_read, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < N_CLASSES
        r = tl.load(logits_row_ptr + cols, mask=mask, other=float("-inf"), eviction_policy=EVICTION).to(DTYPE)
        x, _ = _transform(r, logit_scale, softcap)
        grouped = tl.reshape(x, [GROUPS, GROUP])
        m_new = tl.maximum(m, tl.max(grouped, axis=1))
        # A group of only −inf must not make −inf − (−inf) = NaN.
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        d = d * tl.exp(m - shift) + tl.sum(tl.exp(grouped - shift[:, None]), axis=1)
        m = m_new
        if SPREAD:
            q = _spread_mass(
                cols, mask, target_row_ptr, weight_ptr, label_smoothing, TOTAL_CLASSES, SOFT_TARGETS, DTYPE
            )
            qx += tl.sum(tl.reshape(tl.where(q != 0, q * x, 0.0), [GROUPS, GROUP]), axis=1)
            q_sum += tl.sum(tl.reshape(q, [GROUPS, GROUP]), axis=1)
        if WITH_ARGMAX:
            # Before the soft cap, which rounds large logits to ties; NaN counts as the largest.
            key, _ = _transform(r, logit_scale, None)
            key = tl.reshape(tl.where(key != key, float("inf"), key), [GROUPS, GROUP])
            largest, where = tl.max(key, axis=1, return_indices=True)
            first = start + tl.arange(0, GROUPS) * GROUP
            best_col = tl.where(largest > best, first + where, best_col)
            best = tl.maximum(best, largest)

    m_row = tl.max(m, axis=0)
    base = tl.where(m_row == float("-inf"), 0.0, m_row)
    log_d = tl.log(tl.sum(d * tl.exp(m - base), axis=0))
    s = label_mass
    # Against the row's maximum first: a confident row keeps its small loss.
    loss = tl.where(label_mass != 0, label_mass * (base - label_x), 0.0)
    if SPREAD:
        spread = tl.sum(q_sum, axis=0)
        s = s + spread
        loss += spread * base - tl.sum(qx, axis=0)
    loss += tl.where(s != 0, s * log_d, 0.0)
    predicted = 0
    if WITH_ARGMAX:
        is_best = best == tl.max(best, axis=0)
        predicted = tl.min(tl.where(is_best, best_col, N_CLASSES - 1), axis=0)
    return loss, base + log_d, s, predicted


@triton.jit
def _store_gradient(
    logits_row_ptr,
    target_row_ptr,
    weight_ptr,
    label_column,
    label_mass,
    lse,
    s,
    dloss,
    dlse,
    label_smoothing,
    z_loss,
    logit_scale,
    softcap,
    dlogits_row_ptr,
    dtarget_row_ptr,
    N_CLASSES: tl.constexpr,
    TOTAL_CLASSES: tl.constexpr,
    SOFT_TARGETS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """dlogits_k = slope_k·(a·p_k − b·q_k) with a = dloss·(s + 2λ·lse) + dlse, b = dloss.

    dtarget_k = b·(1−α)·w_k·(lse − x_k).
    A row without upstream gradient is not read; its gradient is 0 whatever it holds. So is that of a masked class.
    """
    SPREAD: tl.constexpr = SOFT_TARGETS or label_smoothing is not None
    a = s
    if z_loss is not None:
        a = a + 2.0 * z_loss * lse
    a = tl.where(dloss == 0, 0.0, dloss * a)
    if dlse is not None:
        a = a + dlse
    if (a == 0) & (dloss == 0):
        for start in tl.range(0, N_CLASSES, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            zeros = tl.zeros([BLOCK], dlogits_row_ptr.dtype.element_ty)
            tl.store(dlogits_row_ptr + cols, zeros, mask=cols < N_CLASSES)
            if dtarget_row_ptr is not None:
                zeros = tl.zeros([BLOCK], dtarget_row_ptr.dtype.element_ty)
                tl.store(dtarget_row_ptr + cols, zeros, mask=cols < N_CLASSES)
    else:
        for start in tl.range(0, N_CLASSES, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            mask = cols < N_CLASSES
            r = tl.load(logits_row_ptr + cols, mask=mask, other=float("-inf"), eviction_policy="evict_first").to(DTYPE)
            x, slope = _transform(r, logit_scale, softcap)
            q = tl.where(cols == label_column, label_mass, 0.0)
            if SPREAD:
                q += _spread_mass(
                    cols, mask, target_row_ptr, weight_ptr, label_smoothing, TOTAL_CLASSES, SOFT_TARGETS, DTYPE
                )
                q = tl.where(x == float("-inf"), 0.0, q)
            dx = a * tl.exp(x - lse) - dloss * q
            if logit_scale is not None or softcap is not None:
                dx = dx * slope
            dlogits = dx.to(dlogits_row_ptr.dtype.element_ty)
            tl.store(dlogits_row_ptr + cols, dlogits, mask=mask, cache_modifier=".cs")
            if dtarget_row_ptr is not None:
                mass = tl.zeros([BLOCK], DTYPE) + dloss
                if label_smoothing is not None:
                    mass = mass * (1.0 - label_smoothing)
                if weight_ptr is not None:
                    mass = mass * tl.load(weight_ptr + cols, mask=mask, other=0.0).to(DTYPE)
                dt = tl.where(mass != 0, mass * (lse - x), 0.0)
                tl.store(dtarget_row_ptr + cols, dt.to(dtarget_row_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _statistics_phase(
    row,
    logits_row_ptr,
    target_row_ptr,
    target_ptr,
    weight_ptr,
    vocab_start_ptr,
    ignore_index,
    label_smoothing,
    z_loss,
    logit_scale,
    softcap,
    loss_ptr,
    lse_ptr,
    target_sum_ptr,
    predicted_ptr,
    EVICTION: tl.constexpr,
    N_CLASSES: tl.constexpr,
    TOTAL_CLASSES: tl.constexpr,
    SOFT_TARGETS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Writes a row's loss, lse, s and argmax; returns what its gradient needs: label column, mass, lse, s, ignored."""
    WITH_ARGMAX: tl.constexpr = predicted_ptr is not None
    column, mass, label_x, ignored, invalid = _row_target(
        row, logits_row_ptr, target_ptr, weight_ptr, vocab_start_ptr, ignore_index, label_smoothing, logit_scale,
        softcap, N_CLASSES, TOTAL_CLASSES, SOFT_TARGETS, DTYPE,
    )  # fmt: skip
    n_read = N_CLASSES
    if not WITH_ARGMAX:
        n_read = tl.where(ignored, 0, N_CLASSES)
    loss, lse, s, predicted = _row_statistics(
        logits_row_ptr, target_row_ptr, weight_ptr, mass, label_x, label_smoothing, logit_scale, softcap, n_read,
        WITH_ARGMAX, EVICTION, N_CLASSES, TOTAL_CLASSES, SOFT_TARGETS, BLOCK, GROUP, DTYPE,
    )  # fmt: skip
    if not WITH_ARGMAX:
        lse = tl.where(ignored, 0.0, lse)
    if z_loss is not None:
        loss += z_loss * lse * lse
    loss = tl.where(ignored, 0.0, tl.where(invalid, float("nan"), loss))
    s = tl.where(ignored, 0.0, tl.where(invalid, float("nan"), s))
    tl.store(loss_ptr + row, loss)
    tl.store(lse_ptr + row, lse)
    tl.store(target_sum_ptr + row, s)
    if WITH_ARGMAX:
        tl.store(predicted_ptr + row, predicted)
    return column, tl.where(label_x == float("-inf"), 0.0, mass), lse, s, ignored


@triton.jit(do_not_specialize=["ignore_index", "rows_inner"])
def cross_entropy_stats_kernel(
    logits_ptr,
    target_ptr,
    weight_ptr,
    vocab_start_ptr,
    ignore_index,
    label_smoothing,
    z_loss,
    logit_scale,
    softcap,
    rows_inner,
    logits_outer_stride,
    loss_ptr,
    lse_ptr,
    target_sum_ptr,
    predicted_ptr,
    N_CLASSES: tl.constexpr,
    TOTAL_CLASSES: tl.constexpr,
    LOGITS_STRIDE: tl.constexpr,
    TARGET_STRIDE: tl.constexpr,
    SOFT_TARGETS: tl.constexpr,
    SCALARS_IN_MEMORY: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program: loss, lse and s = Σq of one row; with predicted_ptr its argmax, and lse of ignored rows too.

    Bytes: the logits (and soft targets) once. Ignored rows are read only where predicted_ptr asks for them.
    Algorithm: one pass of online softmax, kept per thread (Milakov & Gimelshein 2018, arXiv:1805.02867).
    """
    DTYPE: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    _statistics_phase(
        row, logits_ptr + _row_offset(row, LOGITS_STRIDE, rows_inner, logits_outer_stride),
        target_ptr + row * TARGET_STRIDE, target_ptr, weight_ptr,
        vocab_start_ptr, ignore_index, _scalar(label_smoothing, DTYPE, SCALARS_IN_MEMORY),
        _scalar(z_loss, DTYPE, SCALARS_IN_MEMORY), _scalar(logit_scale, DTYPE, SCALARS_IN_MEMORY),
        _scalar(softcap, DTYPE, SCALARS_IN_MEMORY), loss_ptr, lse_ptr, target_sum_ptr, predicted_ptr,
        "evict_first", N_CLASSES, TOTAL_CLASSES, SOFT_TARGETS, BLOCK, GROUP, DTYPE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["ignore_index", "rows_inner"])
def cross_entropy_grad_kernel(
    logits_ptr,
    target_ptr,
    weight_ptr,
    vocab_start_ptr,
    lse_ptr,
    target_sum_ptr,
    dloss_ptr,
    dlse_ptr,
    ignore_index,
    label_smoothing,
    z_loss,
    logit_scale,
    softcap,
    rows_inner,
    logits_outer_stride,
    dlogits_outer_stride,
    dlogits_ptr,
    dtarget_ptr,
    N_CLASSES: tl.constexpr,
    TOTAL_CLASSES: tl.constexpr,
    LOGITS_STRIDE: tl.constexpr,
    DLOGITS_STRIDE: tl.constexpr,
    TARGET_STRIDE: tl.constexpr,
    DLOSS_STRIDE: tl.constexpr,
    DLSE_STRIDE: tl.constexpr,
    SOFT_TARGETS: tl.constexpr,
    SCALARS_IN_MEMORY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: dlogits (and with dtarget_ptr dtarget) of one row, for any upstream gradients of loss and lse.

    Bytes: the logits (and soft targets) read once, each gradient written once; rows with zero upstream only written.
    Algorithm: a·exp(x − lse) − b·q. With dlogits_ptr None the gradient overwrites the logits.
    """
    DTYPE: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    logits_row_ptr = logits_ptr + _row_offset(row, LOGITS_STRIDE, rows_inner, logits_outer_stride)
    alpha = _scalar(label_smoothing, DTYPE, SCALARS_IN_MEMORY)
    scale = _scalar(logit_scale, DTYPE, SCALARS_IN_MEMORY)
    cap = _scalar(softcap, DTYPE, SCALARS_IN_MEMORY)
    column, mass, label_x, ignored, _ = _row_target(
        row, logits_row_ptr, target_ptr, weight_ptr, vocab_start_ptr, ignore_index, alpha, scale, cap,
        N_CLASSES, TOTAL_CLASSES, SOFT_TARGETS, DTYPE,
    )  # fmt: skip
    mass = tl.where(label_x == float("-inf"), 0.0, mass)
    dlse = None
    if dlse_ptr is not None:
        dlse = tl.load(dlse_ptr + row * DLSE_STRIDE).to(DTYPE)
    _store_gradient(
        logits_row_ptr, target_ptr + row * TARGET_STRIDE, weight_ptr, column, mass, tl.load(lse_ptr + row),
        tl.load(target_sum_ptr + row), tl.where(ignored, 0.0, tl.load(dloss_ptr + row * DLOSS_STRIDE).to(DTYPE)), dlse,
        alpha, _scalar(z_loss, DTYPE, SCALARS_IN_MEMORY), scale, cap,
        logits_row_ptr if dlogits_ptr is None
        else dlogits_ptr + _row_offset(row, DLOGITS_STRIDE, rows_inner, dlogits_outer_stride),
        None if dtarget_ptr is None else dtarget_ptr + row * N_CLASSES,
        N_CLASSES, TOTAL_CLASSES, SOFT_TARGETS, BLOCK, DTYPE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["ignore_index", "rows_inner"])
def cross_entropy_fused_kernel(
    logits_ptr,
    target_ptr,
    weight_ptr,
    vocab_start_ptr,
    denominator_ptr,
    ignore_index,
    label_smoothing,
    z_loss,
    logit_scale,
    softcap,
    rows_inner,
    logits_outer_stride,
    dlogits_outer_stride,
    loss_ptr,
    lse_ptr,
    target_sum_ptr,
    dlogits_ptr,
    N_CLASSES: tl.constexpr,
    TOTAL_CLASSES: tl.constexpr,
    LOGITS_STRIDE: tl.constexpr,
    DLOGITS_STRIDE: tl.constexpr,
    TARGET_STRIDE: tl.constexpr,
    DENOMINATOR_STRIDE: tl.constexpr,
    SOFT_TARGETS: tl.constexpr,
    SCALARS_IN_MEMORY: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program: statistics, then gradient of one row whose upstream gradient, 1 / denominator, is known beforehand.

    Bytes: the logits read once from memory and once more, from L2 while few enough rows are in flight; one write.
    Algorithm: the two phases above in one launch. With dlogits_ptr None the gradient overwrites the logits.
    """
    DTYPE: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    logits_row_ptr = logits_ptr + _row_offset(row, LOGITS_STRIDE, rows_inner, logits_outer_stride)
    target_row_ptr = target_ptr + row * TARGET_STRIDE
    alpha = _scalar(label_smoothing, DTYPE, SCALARS_IN_MEMORY)
    z_weight = _scalar(z_loss, DTYPE, SCALARS_IN_MEMORY)
    scale = _scalar(logit_scale, DTYPE, SCALARS_IN_MEMORY)
    cap = _scalar(softcap, DTYPE, SCALARS_IN_MEMORY)
    column, mass, lse, s, ignored = _statistics_phase(
        row, logits_row_ptr, target_row_ptr, target_ptr, weight_ptr, vocab_start_ptr, ignore_index, alpha, z_weight,
        scale, cap, loss_ptr, lse_ptr, target_sum_ptr, None,
        "evict_last", N_CLASSES, TOTAL_CLASSES, SOFT_TARGETS, BLOCK, GROUP, DTYPE,
    )  # fmt: skip
    denominator = tl.load(denominator_ptr + row * DENOMINATOR_STRIDE).to(DTYPE)
    dloss = tl.where(ignored, 0.0, 1.0 / denominator)
    _store_gradient(
        logits_row_ptr, target_row_ptr, weight_ptr, column, mass, lse, s,
        dloss, None, alpha, z_weight, scale, cap,
        logits_row_ptr if dlogits_ptr is None
        else dlogits_ptr + _row_offset(row, DLOGITS_STRIDE, rows_inner, dlogits_outer_stride), None,
        N_CLASSES, TOTAL_CLASSES, SOFT_TARGETS, BLOCK, DTYPE,
    )  # fmt: skip


@triton.jit
def scale_kernel(values_ptr, scale_ptr, n, BLOCK: tl.constexpr):
    """Multiplies n values in place by one device scalar; a scalar of 1 costs only the launch."""
    scale = tl.load(scale_ptr)
    if scale != 1:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in tl.range(first, n, tl.num_programs(0).to(tl.int64) * BLOCK):
            cols = start + tl.arange(0, BLOCK)
            values = tl.load(values_ptr + cols, mask=cols < n).to(scale.dtype)
            tl.store(values_ptr + cols, (values * scale).to(values_ptr.dtype.element_ty), mask=cols < n)
