"""The Triton kernels: three row operations, for long rows here and for tiles of short ones in `ce_kernels.tiles`.

    cross_entropy_stats_kernel   loss, lse, Σq (and argmax)        one program a row, one read of the logits
    cross_entropy_grad_kernel    dlogits (and dtarget) from lse    one program a block of a row, one read, one write
    cross_entropy_fused_kernel   both in one launch                one program, cluster or group of programs a row, one
                                                                   read from memory and one meant for caches, one write

and what stands around them in a training step: `divisor_kernel`, `mean_kernel`, `scale_kernel`.

A row may be a slice of the vocabulary that starts at `vocab_start`; slices merge by lse = log Σ exp(lse_j),
loss = Σ loss_j + s_j·(lse − lse_j). An argument that is None removes its code.

This module imports triton, so nothing but a launch may import it.
"""

import triton
import triton.language as tl

from ce_kernels.elements import (
    aligned,
    leave_cluster,
    mask_of,
    mixed,
    overlap,
    row_offset,
    row_target,
    scalar,
    transform,
    uniform_mass,
)
from ce_kernels.gradients import store_block, store_gradient_block, store_label_gradient, upstream
from ce_kernels.merging import collect, merge_groups, publish
from ce_kernels.statistics import first_of_best, row_statistics, store_ignored_row, store_statistics
from ce_kernels.tiles import cross_entropy_tile_fused_kernel as cross_entropy_tile_fused_kernel
from ce_kernels.tiles import cross_entropy_tile_grad_kernel as cross_entropy_tile_grad_kernel
from ce_kernels.tiles import cross_entropy_tile_stats_kernel as cross_entropy_tile_stats_kernel


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
    SHIFTED: tl.constexpr,
    WIDE_TARGETS: tl.constexpr,
    UNROLL: tl.constexpr,
    CLUSTER: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    """One program: loss, lse and s = Σq of one row; with predicted_ptr its argmax, and lse of ignored rows too.

    Bytes: the logits (and soft targets) once. Ignored rows are read only where predicted_ptr asks for them.
    Algorithm: one pass of online softmax, kept per thread (Milakov & Gimelshein 2018, arXiv:1805.02867).
    """
    DTYPE: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    WITH_ARGMAX: tl.constexpr = predicted_ptr is not None
    SPREAD: tl.constexpr = SOFT_TARGETS or label_smoothing is not None
    overlap(OVERLAPPED)
    row = tl.program_id(0).to(tl.int64)
    offset = row_offset(row, LOGITS_STRIDE, rows_inner, logits_outer_stride)
    start, shift = aligned(offset, GROUP, SHIFTED)
    alpha = scalar(label_smoothing, DTYPE, SCALARS_IN_MEMORY)
    scale = scalar(logit_scale, DTYPE, SCALARS_IN_MEMORY)
    cap = scalar(softcap, DTYPE, SCALARS_IN_MEMORY)
    _, mass, label_x, ignored, invalid = row_target(
        row, logits_ptr + offset, None, target_ptr, weight_ptr, vocab_start_ptr, ignore_index, alpha, scale, cap,
        0, N_CLASSES, None, N_CLASSES, TOTAL_CLASSES, SOFT_TARGETS, DTYPE,
    )  # fmt: skip
    active = mask_of(~ignored)
    if WITH_ARGMAX:
        active = mask_of(row >= 0)
    target_row_ptr = target_ptr + aligned(row * TARGET_STRIDE, GROUP, WIDE_TARGETS)[0]
    FIRST: tl.constexpr = BLOCK if SHIFTED and N_CLASSES >= BLOCK else 0
    FULL: tl.constexpr = N_CLASSES // BLOCK * BLOCK
    STOP: tl.constexpr = N_CLASSES + (GROUP - 1 if SHIFTED else 0)
    m, d, qx, q_sum, best, best_col = row_statistics(
        logits_ptr + start, target_row_ptr, weight_ptr, shift, 0, FIRST, FULL, STOP, shift + N_CLASSES, active, alpha,
        scale, cap, WITH_ARGMAX, "evict_first", TOTAL_CLASSES, SOFT_TARGETS, BLOCK, GROUP, SHIFTED, WIDE_TARGETS,
        UNROLL, DTYPE,
    )  # fmt: skip
    if active:
        uniform = uniform_mass(alpha, weight_ptr, TOTAL_CLASSES, SOFT_TARGETS)
        m_row, d_row, qx_row, q_row = merge_groups(m, d, qx, q_sum, uniform, SPREAD, CLUSTER)
        store_statistics(
            m_row, d_row, qx_row, q_row, row, None, mass, label_x, ignored, invalid, uniform,
            scalar(z_loss, DTYPE, SCALARS_IN_MEMORY), loss_ptr, lse_ptr, target_sum_ptr, SPREAD, N_CLASSES,
        )  # fmt: skip
        if WITH_ARGMAX:
            tl.store(predicted_ptr + row, first_of_best(best, best_col, N_CLASSES))
    else:
        store_ignored_row(row, loss_ptr, lse_ptr, target_sum_ptr)
    leave_cluster(CLUSTER)


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
    GROUP: tl.constexpr,
    SHIFTED: tl.constexpr,
    WIDE_TARGETS: tl.constexpr,
    WIDE_STORES: tl.constexpr,
    BLOCKS_PER_ROW: tl.constexpr,
):
    """One program: dlogits (and with dtarget_ptr dtarget) of one block, for any upstream gradients of loss and lse.

    Bytes: the logits (and soft targets) read once, each gradient written once; rows with zero upstream only written.
    Algorithm: a·exp(x − lse) − b·q. With dlogits_ptr None the gradient overwrites the logits.
    """
    DTYPE: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    # Neighbouring programs walk the same row: fewer streams for the memory than one row a program (1.00 against 1.08).
    row = tl.program_id(0).to(tl.int64) // BLOCKS_PER_ROW
    first = tl.program_id(0) % BLOCKS_PER_ROW * BLOCK
    offset = row_offset(row, LOGITS_STRIDE, rows_inner, logits_outer_stride)
    start, shift = aligned(offset, GROUP, SHIFTED)
    alpha = scalar(label_smoothing, DTYPE, SCALARS_IN_MEMORY)
    scale = scalar(logit_scale, DTYPE, SCALARS_IN_MEMORY)
    cap = scalar(softcap, DTYPE, SCALARS_IN_MEMORY)
    column, mass, label_x, ignored, _ = row_target(
        row, logits_ptr + offset, None, target_ptr, weight_ptr, vocab_start_ptr, ignore_index, alpha, scale, cap,
        first - shift, first - shift + BLOCK, None, N_CLASSES, TOTAL_CLASSES, SOFT_TARGETS, DTYPE,
    )  # fmt: skip
    dlse = None
    if dlse_ptr is not None:
        dlse = tl.load(dlse_ptr + row * DLSE_STRIDE).to(DTYPE)
    dloss = tl.where(ignored, 0.0, tl.load(dloss_ptr + row * DLOSS_STRIDE).to(DTYPE))
    lse = tl.load(lse_ptr + row)
    a, active = upstream(lse, tl.load(target_sum_ptr + row), dloss, dlse, scalar(z_loss, DTYPE, SCALARS_IN_MEMORY))
    lse = tl.where(active, lse, 0.0)
    if dlogits_ptr is None:
        dlogits_row_ptr = logits_ptr + start
    else:
        out_offset = row_offset(row, DLOGITS_STRIDE, rows_inner, dlogits_outer_stride)
        dlogits_row_ptr = dlogits_ptr + aligned(out_offset, GROUP, SHIFTED and WIDE_STORES)[0]
    mass = tl.where(active & (label_x != float("-inf")), mass, 0.0)
    target_row_ptr = target_ptr + aligned(row * TARGET_STRIDE, GROUP, WIDE_TARGETS)[0]
    dtarget_row_ptr = None if dtarget_ptr is None else dtarget_ptr + row * N_CLASSES
    if active & (first >= shift) & (first + BLOCK <= N_CLASSES):
        store_gradient_block(
            first, logits_ptr + start, target_row_ptr, weight_ptr, shift, shift + N_CLASSES, active, column, mass, a,
            dloss, lse, alpha, scale, cap, dlogits_row_ptr, dtarget_row_ptr, False, TOTAL_CLASSES, SOFT_TARGETS,
            WIDE_STORES, BLOCK, GROUP, SHIFTED, WIDE_TARGETS, DTYPE,
        )  # fmt: skip
    else:
        store_gradient_block(
            first, logits_ptr + start, target_row_ptr, weight_ptr, shift, shift + N_CLASSES, active, column, mass, a,
            dloss, lse, alpha, scale, cap, dlogits_row_ptr, dtarget_row_ptr, True, TOTAL_CLASSES, SOFT_TARGETS,
            WIDE_STORES, BLOCK, GROUP, SHIFTED, WIDE_TARGETS, DTYPE,
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
    exchange_ptr,
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
    SHIFTED: tl.constexpr,
    WIDE_TARGETS: tl.constexpr,
    WIDE_STORES: tl.constexpr,
    UNROLL: tl.constexpr,
    BACKWARDS: tl.constexpr,
    CLUSTER: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SLICE: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    """PROGRAMS programs: statistics, then gradient of a row whose upstream gradient, 1 / denominator, is known before.

    Bytes: the logits read once from memory and once more, from L1 or L2 while few enough are in flight; one write.
    Algorithm: the two phases above in one launch. With dlogits_ptr None the gradient overwrites the logits. Programs
    that share a row have SLICE positions of it each, and exchange the statistics of them.
    """
    DTYPE: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    SPREAD: tl.constexpr = SOFT_TARGETS or label_smoothing is not None
    # In place, lines that rows share, and those read again from L2 (of clusters, and of more than L1 holds), would stay
    # when the gradient has overwritten them.
    KEPT: tl.constexpr = SLICE * (logits_ptr.dtype.element_ty.primitive_bitwidth // 8) <= 2 * 40960
    EVICTION: tl.constexpr = "" if dlogits_ptr is None and (SHIFTED or CLUSTER or not KEPT) else "evict_last"
    FIRST: tl.constexpr = BLOCK if SHIFTED and N_CLASSES >= BLOCK else 0
    FULL: tl.constexpr = N_CLASSES // BLOCK * BLOCK
    STOP: tl.constexpr = N_CLASSES + (GROUP - 1 if SHIFTED else 0)
    overlap(OVERLAPPED)
    row = tl.program_id(0) // PROGRAMS
    if PROGRAMS > 1 and not SOFT_TARGETS:
        row = mixed(row, tl.num_programs(0) // PROGRAMS)
    row = row.to(tl.int64)
    alpha = scalar(label_smoothing, DTYPE, SCALARS_IN_MEMORY)
    z_weight = scalar(z_loss, DTYPE, SCALARS_IN_MEMORY)
    scale = scalar(logit_scale, DTYPE, SCALARS_IN_MEMORY)
    cap = scalar(softcap, DTYPE, SCALARS_IN_MEMORY)
    denominator = tl.load(denominator_ptr + row * DENOMINATOR_STRIDE).to(DTYPE)
    # Rounded as the frameworks' division, so that a second backward finds the same bits.
    dloss = tl.div_rn(1.0, denominator) if tl.float32 == DTYPE else 1.0 / denominator
    offset = row_offset(row, LOGITS_STRIDE, rows_inner, logits_outer_stride)
    start, shift = aligned(offset, GROUP, SHIFTED)
    logits_row_ptr = logits_ptr + start
    target_row_ptr = target_ptr + aligned(row * TARGET_STRIDE, GROUP, WIDE_TARGETS)[0]
    column, mass, label_x, ignored, invalid = row_target(
        row, logits_ptr + offset, None, target_ptr, weight_ptr, vocab_start_ptr, ignore_index, alpha, scale,
        cap, 0, N_CLASSES, None, N_CLASSES, TOTAL_CLASSES, SOFT_TARGETS, DTYPE,
    )  # fmt: skip
    label_column = None
    if PROGRAMS == 1:
        writes = None
        label_column = column
        begin, first, full, stop, end = 0, FIRST, FULL, STOP, shift + N_CLASSES
    else:
        program = tl.program_id(0) % PROGRAMS
        begin = program * SLICE
        end = tl.minimum(begin + SLICE, shift + N_CLASSES)
        stop = end
        first = tl.where(program == 0, BLOCK, begin) if SHIFTED else begin
        full = tl.maximum(first, tl.minimum(begin + SLICE, FULL))
        # Loss and lse: who has the label, as in place no other may read its x; the first where nobody has it. It reads
        # later: at the start of so short a part, the wait counts.
        label_r, label_x = tl.cast(0.0, DTYPE), tl.cast(0.0, DTYPE)
        here = mask_of((column >= 0) & (column + shift >= begin) & (column + shift < end))
        writes = here | ((column < 0) & (program == 0))
    if dlogits_ptr is None:
        dlogits_row_ptr = logits_row_ptr
    else:
        out_offset = row_offset(row, DLOGITS_STRIDE, rows_inner, dlogits_outer_stride)
        dlogits_row_ptr = dlogits_ptr + aligned(out_offset, GROUP, SHIFTED and WIDE_STORES)[0]
    active = mask_of(~ignored)
    m, d, qx, q_sum, _, _ = row_statistics(
        logits_row_ptr, target_row_ptr, weight_ptr, shift, begin, first, full, stop, end, active, alpha, scale, cap,
        False, EVICTION, TOTAL_CLASSES, SOFT_TARGETS, BLOCK, GROUP, SHIFTED, WIDE_TARGETS, UNROLL, DTYPE,
    )  # fmt: skip
    lse, s = tl.cast(0.0, DTYPE), tl.cast(0.0, DTYPE)
    if active:
        uniform = uniform_mass(alpha, weight_ptr, TOTAL_CLASSES, SOFT_TARGETS)
        m_row, d_row, qx_row, q_row = merge_groups(m, d, qx, q_sum, uniform, SPREAD, CLUSTER)
        if PROGRAMS > 1:
            publish(m_row, d_row, qx_row, q_row, uniform, exchange_ptr, row, program, SPREAD, PROGRAMS)
            # Before `collect`, whose barrier keeps warps that are ahead from overwriting it in place.
            label_r = tl.load(logits_ptr + offset + tl.where(here, column, 0), mask=here, other=0.0).to(DTYPE)
            label_x = transform(label_r, scale, cap)[0]
            m_row, d_row, qx_row, q_row = collect(qx_row, q_row, uniform, exchange_ptr, row, SPREAD, PROGRAMS)
        lse, s = store_statistics(
            m_row, d_row, qx_row, q_row, row, writes, mass, label_x, ignored, invalid, uniform, z_weight, loss_ptr,
            lse_ptr, target_sum_ptr, SPREAD, N_CLASSES,
        )  # fmt: skip
    else:
        store_ignored_row(row, loss_ptr, lse_ptr, target_sum_ptr)
    dloss = tl.where(active, dloss, 0.0)
    a, active = upstream(lse, s, dloss, None, z_weight)
    lse = tl.where(active, lse, 0.0)
    mass = tl.where(active & (label_x != float("-inf")), mass, 0.0)
    if active:
        for edge in tl.range(full, stop, BLOCK):
            store_gradient_block(
                edge, logits_row_ptr, target_row_ptr, weight_ptr, shift, end, active, label_column, mass, a, dloss,
                lse, alpha, scale, cap, dlogits_row_ptr, None, True, TOTAL_CLASSES, SOFT_TARGETS, WIDE_STORES, BLOCK,
                GROUP, SHIFTED, WIDE_TARGETS, DTYPE,
            )  # fmt: skip
        for step in tl.range(first, full, BLOCK, loop_unroll_factor=UNROLL):
            block = first + full - BLOCK - step if BACKWARDS else step
            store_gradient_block(
                block, logits_row_ptr, target_row_ptr, weight_ptr, shift, end, active, label_column, mass, a, dloss,
                lse, alpha, scale, cap, dlogits_row_ptr, None, False, TOTAL_CLASSES, SOFT_TARGETS, WIDE_STORES, BLOCK,
                GROUP, SHIFTED, WIDE_TARGETS, DTYPE,
            )  # fmt: skip
        if SHIFTED:  # noqa: SIM102 (known when compiling, then not)
            if begin < first:
                store_gradient_block(
                    begin, logits_row_ptr, target_row_ptr, weight_ptr, shift, end, active, label_column, mass, a,
                    dloss, lse, alpha, scale, cap, dlogits_row_ptr, None, True, TOTAL_CLASSES, SOFT_TARGETS,
                    WIDE_STORES, BLOCK, GROUP, SHIFTED, WIDE_TARGETS, DTYPE,
                )  # fmt: skip
        if PROGRAMS > 1 and not SOFT_TARGETS:
            # Over what its block has: to ask every element is two instructions each.
            tl.debug_barrier()
            place = column + shift if WIDE_STORES else column
            store_label_gradient(
                label_r, column, here, weight_ptr, mass, a, dloss, lse, alpha, scale, cap, dlogits_row_ptr + place,
                TOTAL_CLASSES, DTYPE,
            )  # fmt: skip
    else:
        zeros = tl.zeros([BLOCK], dlogits_row_ptr.dtype.element_ty)
        for step in tl.range(begin, stop, BLOCK):
            store_block(dlogits_row_ptr, zeros, step, shift, end, True, WIDE_STORES, BLOCK, GROUP, SHIFTED)
    leave_cluster(CLUSTER)


@triton.jit(do_not_specialize=["n"])
def mean_kernel(
    values_ptr, divisor_ptr, out_ptr, n, SUM_DIVISOR: tl.constexpr, BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr
):
    """One program in all: Σ values / divisor, or with SUM_DIVISOR Σ values / Σ divisors, over n rows.

    Bytes: the row vectors once. Algorithm: sums per lane, then over lanes; the same order every time.
    """
    overlap(OVERLAPPED)
    values = tl.zeros([BLOCK], values_ptr.dtype.element_ty)
    divisors = tl.zeros([BLOCK], values_ptr.dtype.element_ty)
    for start in tl.range(0, n, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        values += tl.load(values_ptr + rows, mask=rows < n, other=0.0)
        if SUM_DIVISOR:
            divisors += tl.load(divisor_ptr + rows, mask=rows < n, other=0.0)
    divisor = tl.sum(divisors, axis=0) if SUM_DIVISOR else tl.load(divisor_ptr)
    tl.store(out_ptr, tl.sum(values, axis=0) / divisor)


@triton.jit(do_not_specialize=["ignore_index", "n", "n_classes"])
def divisor_kernel(
    target_ptr, weight_ptr, ignore_index, out_ptr, n, n_classes, BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr
):
    """One program in all: Σ of the labels' class weights (1 each without them) over n labels that are not ignore_index.

    An invalid label, whose loss is NaN, counts as 1. Bytes: the labels once. Algorithm: as in `mean_kernel`.
    """
    overlap(OVERLAPPED)
    total = tl.zeros([BLOCK], out_ptr.dtype.element_ty)
    for start in tl.range(0, n, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        labels = tl.load(target_ptr + rows, mask=rows < n, other=0).to(tl.int64)
        counted = rows < n
        if ignore_index is not None:
            counted &= labels != ignore_index
        mass = tl.full([BLOCK], 1.0, total.dtype)
        if weight_ptr is not None:
            valid = (labels >= 0) & (labels < n_classes)
            mass = tl.where(valid, tl.load(weight_ptr + tl.where(valid, labels, 0)).to(total.dtype), mass)
        total += tl.where(counted, mass, 0.0)
    tl.store(out_ptr, tl.sum(total, axis=0))


@triton.jit
def scale_kernel(values_ptr, scale_ptr, n, BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr):
    """Multiplies n values in place by one device scalar; a scalar of 1 costs only the launch."""
    overlap(OVERLAPPED)
    scale = tl.load(scale_ptr)
    if scale != 1:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        stride = tl.num_programs(0).to(tl.int64) * BLOCK
        whole = n // BLOCK * BLOCK
        for start in tl.range(first, whole, stride, loop_unroll_factor=2):
            ptrs = values_ptr + start + tl.arange(0, BLOCK)
            values = tl.load(ptrs, eviction_policy="evict_first").to(scale.dtype)
            tl.store(ptrs, (values * scale).to(values_ptr.dtype.element_ty), cache_modifier=".cs")
        if tl.program_id(0) == 0:
            cols = whole + tl.arange(0, BLOCK)
            values = tl.load(values_ptr + cols, mask=cols < n).to(scale.dtype)
            tl.store(values_ptr + cols, (values * scale).to(values_ptr.dtype.element_ty), mask=cols < n)
