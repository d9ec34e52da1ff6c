"""Softmax cross-entropy for JAX: Optax's names and shapes, and every option of ce-kernels, over its Triton kernels."""

from jax_api.losses import RowOutputs as RowOutputs
from jax_api.losses import cross_entropy as cross_entropy
from jax_api.losses import cross_entropy_rows as cross_entropy_rows
from jax_api.optax_losses import softmax_cross_entropy as softmax_cross_entropy
from jax_api.optax_losses import softmax_cross_entropy_with_integer_labels as softmax_cross_entropy_with_integer_labels
