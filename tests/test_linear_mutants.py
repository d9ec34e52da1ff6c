"""Broken chunk loops must be noticed by the cases of tests/test_linear.py."""

import __future__

import inspect

import jax
import pytest

from jax_api import linear_chunks, linear_rules
from tests.frontends import Jax, Torch
from tests.test_linear import BY_NAME, check_reduction
from torch_api import linear_chunks as torch_chunks
from torch_api import linear_rules as torch_rules

# (front end, module, what stands in it, its text, the mutant's)
MUTANTS = {
    "torch: only the last chunk's weight gradient": (
        Torch,
        torch_chunks,
        "Gradients",
        "first=part.start == 0",
        "first=True",
    ),
    "torch: weight gradient of the first chunk's rows": (
        Torch,
        torch_chunks,
        "Gradients",
        "self.cast.hidden[part]",
        "self.cast.hidden[: part.stop - part.start]",
    ),
    "torch: bias gradient of the last chunk": (
        Torch,
        torch_chunks,
        "Gradients",
        "self.dbias += dlogits",
        "self.dbias = dlogits",
    ),
    "torch: no bias in the logits": (Torch, torch_chunks, "_logits", "if head.bias is None", "if True"),
    "torch: the rows left over are lost": (
        Torch,
        torch_chunks,
        "_logits",
        "range(0, n_rows, rows)",
        "range(0, max(n_rows - rows, 1), rows)",
    ),
    "torch: the upstream scalar is lost": (
        Torch,
        torch_rules,
        "LinearLoss",
        "launch.scale_(x, g,",
        "launch.scale_(x, g * 0 + 1,",
    ),
    "jax: rows seen twice count twice in the weight gradient": (
        Jax,
        linear_chunks,
        "_added",
        "jnp.where(chunk.fresh[:, None], chunk.hidden, 0.0)",
        "chunk.hidden",
    ),
    "jax: rows seen twice count twice in the bias gradient": (
        Jax,
        linear_chunks,
        "_added",
        "jnp.where(chunk.fresh[:, None], dlogits, 0.0)",
        "dlogits",
    ),
    "jax: weight gradient of the last chunk": (Jax, linear_chunks, "_added", "dweight += _matmul", "dweight = _matmul"),
    "jax: no bias in the logits": (Jax, linear_chunks, "logits_of", "if bias is None", "if True"),
    "jax: chunks start one row late": (
        Jax,
        linear_chunks,
        "_over_chunks",
        "start = jnp.minimum(i * rows",
        "start = jnp.minimum(i * rows + 1",
    ),
    "jax: the upstream scalar is lost": (Jax, linear_rules, "_linear_loss_bwd", ") * g).astype", ") * 1.0).astype"),
}


@pytest.fixture(autouse=True)
def fresh_traces():
    """Traces hold the functions that they were made of: none from before, none for later tests."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_noticed(name, monkeypatch):
    frontend, module, target, old, new = MUTANTS[name]
    original = getattr(module, target)
    source = inspect.getsource(original)
    assert old in source
    namespace = dict(vars(module))
    code = compile(source.replace(old, new), name, "exec", flags=__future__.annotations.compiler_flag)
    exec(code, namespace)
    if target == "_linear_loss_bwd":
        monkeypatch.setattr(module.linear_loss, "bwd", namespace[target])
    else:
        monkeypatch.setattr(module, target, namespace[target])
        if target == "LinearLoss":
            import torch_api.linear

            monkeypatch.setattr(torch_api.linear, target, namespace[target])
    with pytest.raises((AssertionError, TypeError)):
        check_cases(frontend("reference", "cpu"))


def check_cases(frontend) -> None:
    for case in ("one_row_left_over", "float64"):
        for reduction in ("mean", "none"):
            check_reduction(frontend, BY_NAME[case], reduction)
