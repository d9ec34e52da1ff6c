"""Who is timed: mean losses of (logits, labels) by name, each as its own users call it."""

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F

import torch_api
from benchmarks.names import OURS_JAX, OURS_TORCH


def torch_contenders() -> dict[str, Callable]:
    """PyTorch losses that import here; `torch.compile` as for a program that knows no other shapes."""
    torch.compiler.reset()
    found: dict[str, Callable] = {
        OURS_TORCH: torch_api.cross_entropy,
        "torch": F.cross_entropy,
        "torch.compile": torch.compile(F.cross_entropy),
    }
    for name, module, function in (
        ("Liger", "liger_kernel.transformers.functional", "liger_cross_entropy"),
        ("quack", "quack.cross_entropy", "cross_entropy"),
        ("flash-attention", "flash_attn.ops.triton.cross_entropy", "cross_entropy_loss"),
    ):
        try:
            loss = getattr(importlib.import_module(module), function)
        except ImportError as error:
            print(f"no {name}: {error}")
            continue
        found[name] = loss
        if name == "flash-attention":
            found[name] = lambda logits, labels, loss=loss: loss(logits, labels)[0].mean()
    return found


def jax_contenders() -> dict[str, Callable]:
    """JAX losses."""
    import jax.numpy as jnp
    import optax
    from jax.nn import logsumexp

    import jax_api

    def optax_loss(x, y):
        return optax.softmax_cross_entropy_with_integer_labels(x, y).mean()

    def plain(x, y):
        x = x.astype(jnp.float32)
        return (logsumexp(x, axis=-1) - jnp.take_along_axis(x, y[:, None], axis=-1)[:, 0]).mean()

    return {
        OURS_JAX: jax_api.cross_entropy,
        "Optax": lambda x, y: optax_loss(x.astype(jnp.float32), y),
        "Optax, bf16": optax_loss,
        "logsumexp": plain,
    }
