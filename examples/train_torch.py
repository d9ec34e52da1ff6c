"""Train a small decoder language model in PyTorch: `python -m examples.train_torch --loss ours --steps 100`."""

import argparse
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from examples.common import EPSILON, HEADS, LAYERS, LEARNING_RATE, TIME, VOCAB, WIDTH, initial_weights
from examples.text import load_text
from torch_api import cross_entropy


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(WIDTH, eps=EPSILON)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm2 = nn.RMSNorm(WIDTH, eps=EPSILON)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [batch, time, width]
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, time, width / heads]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(VOCAB, WIDTH)
        self.position_embedding = nn.Embedding(TIME, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH, eps=EPSILON)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:  # [batch, time] -> [batch, time, vocab]
        x = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def load_model(weights: dict[str, np.ndarray]) -> Decoder:
    model = Decoder()
    with torch.no_grad():
        for name, array in weights.items():
            linear = isinstance(model.get_submodule(name), nn.Linear)  # which keeps [output, input]
            model.get_parameter(f"{name}.weight").copy_(torch.from_numpy(array.T if linear else array))
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def our_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels, dim=-1)  # the mean over labels that are not -100


def reference_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


LOSSES = {"ours": our_loss, "reference": reference_loss}


def inputs_and_labels(model: Decoder, windows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Each position's input token and its label, the next token; padding is label -100 and any valid input."""
    tokens = torch.from_numpy(windows).long().to(model.head.weight.device)
    return tokens[..., :-1].clamp(min=0), tokens[..., 1:]


def train(model: Decoder, batches: np.ndarray, loss: str) -> Iterator[float]:
    """Train `model` in place, a step for each of `batches` [steps, batch, time + 1]; yields every step's loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for windows in batches:
        inputs, labels = inputs_and_labels(model, windows)
        value = LOSSES[loss](model(inputs), labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        yield value.item()


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
