"""The front ends behind one interface of NumPy arrays, so that one test serves them all."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import jax_api
import torch_api
from tests.conftest import HAS_GPU


@dataclass
class Result:
    """Outputs of a call and the gradients of Σ upstream · output."""

    value: np.ndarray
    dlogits: np.ndarray
    dtarget: np.ndarray | None = None
    dweight: np.ndarray | None = None


class Torch:
    """torch_api."""

    api = torch_api

    def __init__(self, implementation: str, device: str) -> None:
        self.implementation, self.device = implementation, device

    def array(self, x: np.ndarray) -> torch.Tensor:
        x = np.array(x, order="C")
        if x.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).to(self.device)
        return torch.from_numpy(x).to(self.device)

    def numpy(self, x: torch.Tensor) -> np.ndarray:
        x = x.detach().cpu()
        if x.dtype == torch.bfloat16:
            return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return x.numpy()

    def differentiate(self, function, upstream, *inputs: np.ndarray) -> tuple[list, list]:
        """function's outputs (a tuple) and the gradients of Σ upstream·outputs by every input; None for no upstream."""
        leaves = [self.array(x).requires_grad_() for x in inputs]
        # Not leaves: the usual logits are an operation's output.
        outputs = function(*(leaf * 1 for leaf in leaves))
        pairs = [(y, self.array(dy)) for y, dy in zip(outputs, upstream, strict=True) if dy is not None]
        grads = torch.autograd.grad([y for y, _ in pairs], leaves, [dy for _, dy in pairs], allow_unused=True)
        return [self.numpy(y) for y in outputs], [None if g is None else self.numpy(g) for g in grads]


class Jax:
    """jax_api under jit."""

    api = jax_api

    def __init__(self, implementation: str, device: str) -> None:
        self.implementation, self.device = implementation, device

    def array(self, x: np.ndarray) -> jax.Array:
        return jnp.asarray(x)

    def numpy(self, x: jax.Array) -> np.ndarray:
        return np.asarray(x)

    def differentiate(self, function, upstream, *inputs: np.ndarray) -> tuple[list, list]:
        """As Torch.differentiate."""

        @jax.jit
        def run(*arrays):
            outputs, pull = jax.vjp(lambda *arrays: tuple(function(*arrays)), *arrays)
            cotangents = tuple(
                _zero(y) if dy is None else jnp.asarray(dy, y.dtype) for y, dy in zip(outputs, upstream, strict=True)
            )
            return outputs, pull(cotangents)

        outputs, grads = run(*(self.array(x) for x in inputs))
        return [self.numpy(y) for y in outputs], [self.numpy(g) for g in grads]


def _zero(y):
    return jnp.zeros_like(y) if jnp.issubdtype(y.dtype, jnp.floating) else np.zeros(y.shape, jax.dtypes.float0)


def _make(kind, name: str, implementation: str, on_gpu: bool):
    marks = [pytest.mark.gpu] if on_gpu else []
    if not on_gpu and implementation == "triton" and HAS_GPU:
        # One mode a process: on a GPU host the kernels are compiled.
        marks = [pytest.mark.skip(reason="the interpreter needs a process without a GPU")]
    return pytest.param(kind(implementation, "cuda" if on_gpu else "cpu"), id=name, marks=marks)


FRONTENDS = [
    _make(kind, f"{kind.__name__.lower()}-{name}", implementation, on_gpu)
    for kind in (Torch, Jax)
    for name, implementation, on_gpu in (
        ("reference", "reference", False),
        ("interpreter", "triton", False),
        ("gpu", "triton", True),
    )
]
each_frontend = pytest.mark.parametrize("frontend", FRONTENDS)
each_kernel = pytest.mark.parametrize("frontend", [one for one in FRONTENDS if "reference" not in one.id])
each_torch_kernel = pytest.mark.parametrize(
    "frontend", [one for one in FRONTENDS if one.id in ("torch-interpreter", "torch-gpu")]
)
