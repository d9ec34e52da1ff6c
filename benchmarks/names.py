"""Contenders' names, in the order of tables and plots."""

OURS_TORCH, OURS_JAX = "ce-kernels torch", "ce-kernels JAX"
# Peers that overwrite their logits get a copy, whose time is taken off.
OVERWRITES = ("Liger", "quack")
ORDER = (
    OURS_TORCH,
    OURS_JAX,
    "torch",
    "torch.compile",
    "Liger",
    "quack",
    "flash-attention",
    "Optax",
    "Optax, bf16",
    "logsumexp",
)
# What only moves the bytes of an option's training step; a copy moves those of the others.
BYTES = {
    "soft targets": "read two, write one",
    "every other row ignored": "read every other row, write all",
    "every other 256 rows ignored": "read every other 256 rows, write all",
}
