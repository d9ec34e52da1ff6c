"""The row kernels of `ce_kernels.kernels` for tiles: many rows a program, for short rows and for strided classes.

    cross_entropy_tile_stats_kernel, cross_entropy_tile_grad_kernel, cross_entropy_tile_fused_kernel

A program of a short row costs more than its bytes, and where the classes of a row lie apart, as those of (N, C, d1) do,
neighbouring rows are what lies side by side. A tile is ROWS neighbouring rows, walked BLOCK classes a step; a row's
running values are kept per row. Parameters are those of the row kernels, and

    rows_inner            rows are counted in groups of so many; a tile lies in one group
    *_outer_stride        from group to group; None where there is one group
    *_class_stride        from class to class; None for 1

This module imports triton, so nothing but a launch may import it.
"""

import triton
import triton.language as tl

from ce_kernels.elements import load_columns, overlap, row_target, scalar, uniform_mass
from ce_kernels.gradients import gradient, store_target_gradient, upstream
from ce_kernels.statistics import accumulate, store_statistics


@triton.jit
def tile_place(tile, rows_inner, ROWS: tl.constexpr):
    """A tile's group of rows, its first row in that group, which of its rows there are, and all their numbers.

    The numbers of rows that there are not are the last row's.
    """
    tiles = tl.cdiv(rows_inner, ROWS)
    first = tile % tiles * ROWS
    inner = first + tl.arange(0, ROWS)
    outer = (tile // tiles).to(tl.int64)
    return outer, first, inner < rows_inner, outer * rows_inner + tl.minimum(inner, rows_inner - 1)


@triton.jit
def tile_rows_ptr(ptr, outer, first, outer_stride, STRIDE: tl.constexpr, ROWS: tl.constexpr):
    """Pointers to a tile's rows."""
    ptr += first.to(tl.int64) * STRIDE
    if outer_stride is not None:
        ptr += outer * outer_stride
    return ptr + tl.arange(0, ROWS).to(tl.int64) * STRIDE


@triton.jit
def tile_columns(start, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    return tl.broadcast_to((start + tl.arange(0, BLOCK))[None, :], [ROWS, BLOCK])


@triton.jit
def tile_mask(rows, start, N_CLASSES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Where rows [ROWS] hold and there are classes."""
    if N_CLASSES % BLOCK == 0:
        return tl.broadcast_to(rows[:, None], [ROWS, BLOCK])
    else:
        return rows[:, None] & (tile_columns(start, ROWS, BLOCK) < N_CLASSES)


@triton.jit
def tile_ptrs(rows_ptr, start, class_stride, BLOCK: tl.constexpr):
    """Pointers to the classes from start on."""
    if class_stride is None:
        return (rows_ptr + start)[:, None] + tl.arange(0, BLOCK)[None, :]
    else:
        first_ptr = rows_ptr + tl.cast(start, tl.int64) * class_stride
        return first_ptr[:, None] + (tl.arange(0, BLOCK).to(tl.int64) * class_stride)[None, :]


@triton.jit
def load_tile(
    rows_ptr,
    start,
    class_stride,
    present,
    active,
    EVICTION: tl.constexpr,
    N_CLASSES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_A_THREAD: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Raw logits [ROWS, BLOCK] of the classes from start on: −inf beyond the last, and in rows that are not active."""
    # Where neighbouring rows are read at once, a mask by row would make every load one of a single element.
    rows = active if class_stride is None else present
    mask = tile_mask(rows, start, N_CLASSES, ROWS, BLOCK)
    if ROW_A_THREAD:
        # A thread reads a whole row, class after class, out of the cache. Nothing may tell the compiler that these are
        # neighbours, or it lets many threads share a row.
        ptrs = (rows_ptr + start)[None, :] + tl.arange(0, BLOCK)[:, None] * tl.num_programs(1)
        r = tl.trans(tl.load(ptrs, mask=tl.trans(mask), other=float("-inf"))).to(DTYPE)
    else:
        ptrs = tile_ptrs(rows_ptr, start, class_stride, BLOCK)
        r = tl.load(ptrs, mask=mask, other=float("-inf"), eviction_policy=EVICTION).to(DTYPE)
    return r if class_stride is None else tl.where(active[:, None], r, float("-inf"))


@triton.jit
def tile_statistics(
    rows_ptr,
    class_stride,
    present,
    active,
    target_rows_ptr,
    weight_ptr,
    label_smoothing,
    logit_scale,
    softcap,
    WITH_ARGMAX: tl.constexpr,
    EVICTION: tl.constexpr,
    N_CLASSES: tl.constexpr,
    TOTAL_CLASSES: tl.constexpr,
    SOFT_TARGETS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_A_THREAD: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Maximum, sum of exponentials, Σqx, Σq and argmax of whole rows, and the raw logits of the last step."""
    m = tl.full([ROWS], float("-inf"), DTYPE)
    d = tl.zeros([ROWS], DTYPE)
    qx = tl.zeros([ROWS], DTYPE)
    q_sum = tl.zeros([ROWS], DTYPE)
    best = tl.full([ROWS], float("-inf"), DTYPE)
    best_col = tl.zeros([ROWS], tl.int32)
    r = tl.zeros([ROWS, BLOCK], DTYPE)
    for start in tl.range(0, N_CLASSES, BLOCK):
        r = load_tile(
            rows_ptr, start, class_stride, present, active, EVICTION, N_CLASSES, ROWS, BLOCK, ROW_A_THREAD, DTYPE
        )  # fmt: skip
        cols = tile_columns(start, ROWS, BLOCK)
        inside = tile_mask(active, start, N_CLASSES, ROWS, BLOCK)
        t = None
        if SOFT_TARGETS:
            t = load_columns(target_rows_ptr, cols, inside, EVICTION).to(DTYPE)
        m, d, qx, q_sum, best, best_col = accumulate(
            m, d, qx, q_sum, best, best_col, r, t, cols, inside, start, weight_ptr, label_smoothing, logit_scale,
            softcap, WITH_ARGMAX, TOTAL_CLASSES, ROWS, BLOCK, 0, DTYPE,
        )  # fmt: skip
    # A row that is not read has lse 0.
    d = tl.where(active, d, 1.0)
    return tl.where(m == float("-inf"), 0.0, m), d, qx, q_sum, best_col, r


@triton.jit
def store_tile_gradient(
    r,
    start,
    present,
    active,
    label_column,
    label_mass,
    a,
    dloss,
    lse,
    target_rows_ptr,
    weight_ptr,
    label_smoothing,
    logit_scale,
    softcap,
    dlogits_rows_ptr,
    dlogits_class_stride,
    dtarget_rows_ptr,
    N_CLASSES: tl.constexpr,
    TOTAL_CLASSES: tl.constexpr,
    SOFT_TARGETS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Writes dlogits, and dtarget where there are pointers to it, of raw logits r, the classes from start on."""
    cols = tile_columns(start, ROWS, BLOCK)
    inside = tile_mask(present, start, N_CLASSES, ROWS, BLOCK)
    t = None
    if SOFT_TARGETS:
        t = load_columns(target_rows_ptr, cols, inside & active[:, None], "evict_first").to(DTYPE)
    dx = gradient(
        r, t, cols, inside & active[:, None], label_column - start, weight_ptr, label_mass[:, None], a[:, None],
        dloss[:, None], lse[:, None], label_smoothing, logit_scale, softcap, TOTAL_CLASSES, ROWS, BLOCK, 0, DTYPE,
    )  # fmt: skip
    ptrs = tile_ptrs(dlogits_rows_ptr, start, dlogits_class_stride, BLOCK)
    tl.store(ptrs, dx.to(dlogits_rows_ptr.dtype.element_ty), mask=inside, cache_modifier=".cs")
    if dtarget_rows_ptr is not None:
        store_target_gradient(
            r, cols, inside, dtarget_rows_ptr, weight_ptr, dloss[:, None], lse[:, None], label_smoothing, logit_scale,
            softcap, DTYPE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_tile_stats_kernel(
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
    logits_class_stride,
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
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_A_THREAD: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    """One program: loss, lse and s = Σq of a tile's rows; with predicted_ptr their argmax, and lse of ignored rows too.

    Bytes: the logits (and soft targets) once. Algorithm: one pass of online softmax.
    """
    DTYPE: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    WITH_ARGMAX: tl.constexpr = predicted_ptr is not None
    overlap(OVERLAPPED)
    outer, first, present, row = tile_place(tl.program_id(0), rows_inner, ROWS)
    alpha = scalar(label_smoothing, DTYPE, SCALARS_IN_MEMORY)
    scale = scalar(logit_scale, DTYPE, SCALARS_IN_MEMORY)
    cap = scalar(softcap, DTYPE, SCALARS_IN_MEMORY)
    rows_ptr = tile_rows_ptr(logits_ptr, outer, first, logits_outer_stride, LOGITS_STRIDE, ROWS)
    _, mass, label_x, ignored, invalid = row_target(
        row, rows_ptr, logits_class_stride, target_ptr, weight_ptr, vocab_start_ptr, ignore_index, alpha, scale, cap,
        0, N_CLASSES, present, N_CLASSES, TOTAL_CLASSES, SOFT_TARGETS, DTYPE,
    )  # fmt: skip
    active = present if WITH_ARGMAX else present & ~ignored
    m, d, qx, q_sum, best_col, _ = tile_statistics(
        rows_ptr, logits_class_stride, present, active, (target_ptr + row * TARGET_STRIDE)[:, None], weight_ptr, alpha,
        scale, cap, WITH_ARGMAX, "evict_first", N_CLASSES, TOTAL_CLASSES, SOFT_TARGETS, ROWS, BLOCK, ROW_A_THREAD,
        DTYPE,
    )  # fmt: skip
    store_statistics(
        m, d, qx, q_sum, row, present, mass, label_x, ignored, invalid,
        uniform_mass(alpha, weight_ptr, TOTAL_CLASSES, SOFT_TARGETS), scalar(z_loss, DTYPE, SCALARS_IN_MEMORY),
        loss_ptr, lse_ptr, target_sum_ptr, SOFT_TARGETS or label_smoothing is not None, N_CLASSES,
    )  # fmt: skip
    if WITH_ARGMAX:
        tl.store(predicted_ptr + row, best_col, mask=present)


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_tile_grad_kernel(
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
    logits_class_stride,
    dlogits_class_stride,
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
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS_PER_ROW: tl.constexpr,
):
    """One program: dlogits (and with dtarget_ptr dtarget) of a block of a tile's classes, for any upstream gradients.

    Bytes: the logits (and soft targets) read once, each gradient written once; rows with zero upstream only written.
    Algorithm: a·exp(x − lse) − b·q. With dlogits_ptr None the gradient overwrites the logits.
    """
    DTYPE: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    outer, first, present, row = tile_place(tl.program_id(0) // BLOCKS_PER_ROW, rows_inner, ROWS)
    start = tl.program_id(0) % BLOCKS_PER_ROW * BLOCK
    alpha = scalar(label_smoothing, DTYPE, SCALARS_IN_MEMORY)
    scale = scalar(logit_scale, DTYPE, SCALARS_IN_MEMORY)
    cap = scalar(softcap, DTYPE, SCALARS_IN_MEMORY)
    rows_ptr = tile_rows_ptr(logits_ptr, outer, first, logits_outer_stride, LOGITS_STRIDE, ROWS)
    column, mass, label_x, ignored, _ = row_target(
        row, rows_ptr, logits_class_stride, target_ptr, weight_ptr, vocab_start_ptr, ignore_index, alpha, scale, cap,
        start, start + BLOCK, present, N_CLASSES, TOTAL_CLASSES, SOFT_TARGETS, DTYPE,
    )  # fmt: skip
    dlse = None
    if dlse_ptr is not None:
        dlse = tl.load(dlse_ptr + row * DLSE_STRIDE).to(DTYPE)
    dloss = tl.where(ignored, 0.0, tl.load(dloss_ptr + row * DLOSS_STRIDE).to(DTYPE))
    lse = tl.load(lse_ptr + row)
    a, active = upstream(lse, tl.load(target_sum_ptr + row), dloss, dlse, scalar(z_loss, DTYPE, SCALARS_IN_MEMORY))
    lse = tl.where(active, lse, 0.0)
    mass = tl.where(active & (label_x != float("-inf")), mass, 0.0)
    out_ptr, out_stride = rows_ptr, logits_class_stride
    if dlogits_ptr is not None:
        out_ptr = tile_rows_ptr(dlogits_ptr, outer, first, dlogits_outer_stride, DLOGITS_STRIDE, ROWS)
        out_stride = dlogits_class_stride
    r = load_tile(
        rows_ptr, start, logits_class_stride, present, active & present, "evict_first", N_CLASSES, ROWS, BLOCK,
        False, DTYPE,
    )  # fmt: skip
    store_tile_gradient(
        r, start, present, active, column, mass, a, dloss, lse, (target_ptr + row * TARGET_STRIDE)[:, None], weight_ptr,
        alpha, scale, cap, out_ptr, out_stride,
        None if dtarget_ptr is None else (dtarget_ptr + row * N_CLASSES)[:, None], N_CLASSES, TOTAL_CLASSES,
        SOFT_TARGETS, ROWS, BLOCK, DTYPE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_tile_fused_kernel(
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
    logits_class_stride,
    dlogits_class_stride,
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
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_A_THREAD: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    """One program: statistics, then gradient of a tile whose upstream gradient, 1 / denominator, is known beforehand.

    Bytes: the logits read once, and once more where a step does not hold them all or ROW_A_THREAD holds them in threads
    that are not those that write; one write.
    Algorithm: the two phases above in one launch. With dlogits_ptr None the gradient overwrites the logits.
    """
    DTYPE: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    overlap(OVERLAPPED)
    outer, first, present, row = tile_place(tl.program_id(0), rows_inner, ROWS)
    alpha = scalar(label_smoothing, DTYPE, SCALARS_IN_MEMORY)
    z_weight = scalar(z_loss, DTYPE, SCALARS_IN_MEMORY)
    scale = scalar(logit_scale, DTYPE, SCALARS_IN_MEMORY)
    cap = scalar(softcap, DTYPE, SCALARS_IN_MEMORY)
    # One division for all rows where one number divides them.
    rows = row * DENOMINATOR_STRIDE if DENOMINATOR_STRIDE else 0
    denominator = tl.load(denominator_ptr + rows).to(DTYPE)
    # Rounded as the frameworks' division, so that a second backward finds the same bits.
    dloss = tl.div_rn(1.0, denominator) if tl.float32 == DTYPE else 1.0 / denominator
    rows_ptr = tile_rows_ptr(logits_ptr, outer, first, logits_outer_stride, LOGITS_STRIDE, ROWS)
    target_rows_ptr = (target_ptr + row * TARGET_STRIDE)[:, None]
    column, mass, label_x, ignored, invalid = row_target(
        row, rows_ptr, logits_class_stride, target_ptr, weight_ptr, vocab_start_ptr, ignore_index, alpha, scale, cap,
        0, N_CLASSES, present, N_CLASSES, TOTAL_CLASSES, SOFT_TARGETS, DTYPE,
    )  # fmt: skip
    m, d, qx, q_sum, _, r = tile_statistics(
        rows_ptr, logits_class_stride, present, present & ~ignored, target_rows_ptr, weight_ptr, alpha, scale, cap,
        False, "", N_CLASSES, TOTAL_CLASSES, SOFT_TARGETS, ROWS, BLOCK, ROW_A_THREAD, DTYPE,
    )  # fmt: skip
    lse, s = store_statistics(
        m, d, qx, q_sum, row, present, mass, label_x, ignored, invalid,
        uniform_mass(alpha, weight_ptr, TOTAL_CLASSES, SOFT_TARGETS), z_weight, loss_ptr, lse_ptr, target_sum_ptr,
        SOFT_TARGETS or label_smoothing is not None, N_CLASSES,
    )  # fmt: skip
    dloss = tl.where(ignored, 0.0, dloss)
    a, active = upstream(lse, s, dloss, None, z_weight)
    lse = tl.where(active, lse, 0.0)
    mass = tl.where(active & (label_x != float("-inf")), mass, 0.0)
    out_ptr, out_stride = rows_ptr, logits_class_stride
    if dlogits_ptr is not None:
        out_ptr = tile_rows_ptr(dlogits_ptr, outer, first, dlogits_outer_stride, DLOGITS_STRIDE, ROWS)
        out_stride = dlogits_class_stride
    LAST: tl.constexpr = (N_CLASSES - 1) // BLOCK * BLOCK
    for step in tl.range(0, N_CLASSES, BLOCK):
        # What was read last is met first.
        start = LAST - step
        if N_CLASSES > BLOCK or ROW_A_THREAD:
            r = load_tile(
                rows_ptr, start, logits_class_stride, present, active & present, "evict_first", N_CLASSES, ROWS, BLOCK,
                False, DTYPE,
            )  # fmt: skip
        store_tile_gradient(
            r, start, present, active, column, mass, a, dloss, lse, target_rows_ptr, weight_ptr, alpha, scale, cap,
            out_ptr, out_stride, None, N_CLASSES, TOTAL_CLASSES, SOFT_TARGETS, ROWS, BLOCK, DTYPE,
        )  # fmt: skip
