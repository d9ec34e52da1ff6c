"""Train the decoder of `examples.train_torch` with Lightning: `python -m examples.train_lightning --steps 20`."""

import argparse

import lightning
import torch
from torch.utils.data import DataLoader

from examples.common import BATCH, LEARNING_RATE, initial_weights
from examples.text import load_text
from examples.train_torch import LOSSES, inputs_and_labels, load_model


class LanguageModel(lightning.LightningModule):
    """The decoder and its loss; `loss` is "ours" or "reference"."""

    def __init__(self, loss: str) -> None:
        super().__init__()
        self.model = load_model(initial_weights())
        self.loss = LOSSES[loss]
        self.losses: list[float] = []

    def training_step(self, windows: torch.Tensor, _: int) -> torch.Tensor:
        inputs, labels = inputs_and_labels(self.model, windows.cpu().numpy())
        loss = self.loss(self.model(inputs), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=LEARNING_RATE)


def train(loss: str, steps: int, precision: str = "32-true") -> list[float]:
    """The loss of every step."""
    module = LanguageModel(loss)
    trainer = lightning.Trainer(
        max_steps=steps,
        precision=precision,  # pyright: ignore[reportArgumentType]
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(load_text().batches(1, BATCH * steps)[0], batch_size=BATCH))
    return module.losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loss", choices=LOSSES, default="ours")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    for step, loss in enumerate(train(options.loss, options.steps)):
        print(f"step {step} loss {loss:.6f}")


if __name__ == "__main__":
    main()
