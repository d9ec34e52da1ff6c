"""Per-sample losses in PyTorch: which text is hard, and a custom loss. `python -m examples.per_sample_torch`."""

import argparse

import numpy as np
import torch
from torch import Tensor

from examples import per_sample
from examples.common import BATCH, IGNORE, initial_weights
from examples.text import Text, load_text
from examples.train_torch import Decoder, inputs_and_labels, load_model, train
from torch_api import cross_entropy, cross_entropy_rows


@torch.no_grad()
def per_token(model: Decoder, text: Text) -> list[np.ndarray]:
    """Loss, lse and predicted class of every position, each [windows, time]; the loss is 0 where there is no label."""
    parts = []
    for start in range(0, len(text.windows), BATCH):
        inputs, labels = inputs_and_labels(model, text.windows[start : start + BATCH])
        parts.append(cross_entropy_rows(model(inputs), labels, dim=-1))
    return [torch.cat(arrays).cpu().numpy() for arrays in zip(*parts, strict=True)]


def focal_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Σ w·(1 − p)²·ℓ / Σ w, with p = exp(−ℓ) the probability of the label: what is known already counts less."""
    loss = cross_entropy(logits, labels, dim=-1, reduction="none")  # [batch, time]
    return (weights * (1 - torch.exp(-loss)) ** 2 * loss).sum() / weights.sum()


def plain_focal_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    index = labels.where(labels != IGNORE, 0).unsqueeze(-1)  # weights are 0 there
    log_p = logits.log_softmax(dim=-1).gather(-1, index).squeeze(-1)
    return -(weights * (1 - log_p.exp()) ** 2 * log_p).sum() / weights.sum()


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

    inputs, labels = inputs_and_labels(model, text.windows[:BATCH])
    weights = torch.from_numpy(per_sample.balanced_weights(text)[:BATCH]).to(labels.device)
    logits = model(inputs).detach().requires_grad_()
    (ours,) = torch.autograd.grad(focal_loss(logits, labels, weights), logits)
    (plain,) = torch.autograd.grad(plain_focal_loss(logits, labels, weights), logits)
    per_sample.check_gradient(ours.cpu().numpy(), plain.cpu().numpy())


if __name__ == "__main__":
    main()
