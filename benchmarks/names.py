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
