"""Softmax cross-entropy for JAX: Optax's names and shapes, and every option of ce-kernels, over its Triton kernels."""

from importlib.util import find_spec

from ce_kernels.spec import fail

if find_spec("jax") is None:
    fail(ImportError, "jax_api without jax", "jax", "pip install 'ce-kernels[jax]'")

from jax_api.linear import linear_cross_entropy as linear_cross_entropy
from jax_api.linear import linear_cross_entropy_rows as linear_cross_entropy_rows
from jax_api.losses import RowOutputs as RowOutputs
from jax_api.losses import cross_entropy as cross_entropy
from jax_api.losses import cross_entropy_rows as cross_entropy_rows
from jax_api.optax_losses import softmax_cross_entropy as softmax_cross_entropy
from jax_api.optax_losses import softmax_cross_entropy_with_integer_labels as softmax_cross_entropy_with_integer_labels
