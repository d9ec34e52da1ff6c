"""Kernels that only move bytes: what bounds a forward pass, and a training step of which rows are ignored."""

import triton
import triton.language as tl


@triton.jit
def read_kernel(words_ptr, out_ptr, n_words, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """One program: reads BLOCK of n 4-byte words, fewer at the end unless that is EVEN, and writes one."""
    row = tl.program_id(0).to(tl.int64)
    place = row * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(words_ptr + place) if EVEN else tl.load(words_ptr + place, mask=place < n_words, other=0)
    tl.store(out_ptr + row, tl.max(words, axis=0))


@triton.jit
def copy_kept_kernel(rows_ptr, kept_ptr, out_ptr, N_WORDS: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    """PROGRAMS programs: copy a row of N_WORDS 4-byte words where it is kept; else write zeros and read nothing."""
    row = (tl.program_id(0) // PROGRAMS).to(tl.int64)
    place = tl.program_id(0) % PROGRAMS * BLOCK + tl.arange(0, BLOCK)
    inside = place < N_WORDS
    words = tl.zeros([BLOCK], tl.int32)
    if tl.load(kept_ptr + row):
        words = tl.load(rows_ptr + row * N_WORDS + place, mask=inside, other=0)
    tl.store(out_ptr + row * N_WORDS + place, words, mask=inside, cache_modifier=".cs")
