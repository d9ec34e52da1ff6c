"""Per-sample losses in JAX: which text is hard, and a custom loss. `python -m examples.per_sample_jax`."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from examples import per_sample
from examples.common import BATCH, IGNORE, initial_weights
from examples.text import Text, load_text
from examples.train_jax import Decoder, inputs_and_labels, load_model, train
from jax_api import RowOutputs, cross_entropy, cross_entropy_rows


@nnx.jit
def evaluate(model: Decoder, inputs: Array, labels: Array) -> RowOutputs:
    return cross_entropy_rows(model(inputs), labels)


def per_token(model: Decoder, text: Text) -> list[np.ndarray]:
    """Loss, lse and predicted class of every position, each [windows, time]; the loss is 0 where there is no label."""
    parts = []
    for start in range(0, len(text.windows), BATCH):
        parts.append(evaluate(model, *inputs_and_labels(text.windows[start : start + BATCH])))
    return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def focal_loss(logits: Array, labels: Array, weights: Array) -> Array:
    """Σ w·(1 − p)²·ℓ / Σ w, with p = exp(−ℓ) the probability of the label: what is known already counts less."""
    loss = cross_entropy(logits, labels, reduction="none")  # [batch, time]
    return jnp.sum(weights * (1 - jnp.exp(-loss)) ** 2 * loss) / jnp.sum(weights)


def plain_focal_loss(logits: Array, labels: Array, weights: Array) -> Array:
    index = jnp.where(labels != IGNORE, labels, 0)[..., None]  # weights are 0 there
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), index, axis=-1).squeeze(-1)
    return -jnp.sum(weights * (1 - jnp.exp(log_p)) ** 2 * log_p) / jnp.sum(weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30, help="of training before the analysis")
    options = parser.parse_args()
    text = load_text()
    model = load_model(initial_weights())
    for _ in train(model, text.batches(options.steps), "ours"):
        pass

    text = per_sample.sample(text)
    per_sample.report(text, *per_token(model, text))

    inputs, labels = inputs_and_labels(text.windows[:BATCH])
    weights = jnp.asarray(per_sample.balanced_weights(text)[:BATCH])
    logits = model(inputs)
    ours = jax.jit(jax.grad(focal_loss))(logits, labels, weights)
    plain = jax.jit(jax.grad(plain_focal_loss))(logits, labels, weights)
    per_sample.check_gradient(np.asarray(ours), np.asarray(plain))


if __name__ == "__main__":
    main()
