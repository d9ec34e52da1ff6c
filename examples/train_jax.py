"""Train a small decoder language model in Flax: `python -m examples.train_jax --loss ours --steps 100`."""

import argparse
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from tqdm import tqdm

from examples.common import EPSILON, HEADS, IGNORE, LAYERS, LEARNING_RATE, TIME, VOCAB, WIDTH, initial_weights
from examples.text import load_text
from jax_api import cross_entropy


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm1 = nnx.RMSNorm(WIDTH, epsilon=EPSILON, rngs=rngs)
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.norm2 = nnx.RMSNorm(WIDTH, epsilon=EPSILON, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x: Array) -> Array:  # [batch, time, width]
        qkv = self.qkv(self.norm1(x)).reshape(*x.shape[:2], 3, HEADS, WIDTH // HEADS)
        q, k, v = jnp.moveaxis(qkv, 2, 0)  # each [batch, time, heads, width / heads]
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm2(x)), approximate=True))


class Decoder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.token_embedding = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.position_embedding = nnx.Embed(TIME, WIDTH, rngs=rngs)
        self.blocks = nnx.List(Block(rngs) for _ in range(LAYERS))
        self.norm = nnx.RMSNorm(WIDTH, epsilon=EPSILON, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, tokens: Array) -> Array:  # [batch, time] -> [batch, time, vocab]
        x = self.token_embedding(tokens) + self.position_embedding.embedding[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def load_model(weights: dict[str, np.ndarray]) -> Decoder:
    model = Decoder(nnx.Rngs(0))
    modules = {".".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    for name, array in weights.items():
        parameter = "embedding" if isinstance(modules[name], nnx.Embed) else "kernel"
        getattr(modules[name], parameter).set_value(jnp.asarray(array))
    return model


def our_loss(logits: Array, labels: Array) -> Array:
    return cross_entropy(logits, labels)  # the mean over labels that are not -100


def reference_loss(logits: Array, labels: Array) -> Array:
    valid = labels != IGNORE
    rows = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(valid, labels, 0))
    return jnp.sum(rows, where=valid) / jnp.sum(valid)


LOSSES = {"ours": our_loss, "reference": reference_loss}


def inputs_and_labels(windows: np.ndarray) -> tuple[Array, Array]:
    """Each position's input token and its label, the next token; padding is label -100 and any valid input."""
    tokens = jnp.asarray(windows)
    return tokens[..., :-1].clip(min=0), tokens[..., 1:]


@nnx.jit(static_argnames="loss")
def train_step(model: Decoder, optimizer: nnx.Optimizer, inputs: Array, labels: Array, loss: str) -> Array:
    value, grads = nnx.value_and_grad(lambda model: LOSSES[loss](model(inputs), labels))(model)
    optimizer.update(model, grads)
    return value


def train(model: Decoder, batches: np.ndarray, loss: str) -> Iterator[float]:
    """Train `model` in place, a step for each of `batches` [steps, batch, time + 1]; yields every step's loss."""
    optimizer = nnx.Optimizer(model, optax.adam(LEARNING_RATE), wrt=nnx.Param)
    for windows in batches:
        yield float(train_step(model, optimizer, *inputs_and_labels(windows), loss=loss))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loss", choices=LOSSES, default="ours")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    batches = load_text().batches(options.steps)
    with tqdm(train(load_model(initial_weights()), batches, options.loss), total=options.steps) as progress:
        for value in progress:
            progress.set_postfix(loss=f"{value:.4f}")


if __name__ == "__main__":
    main()
