"""Train a small Llama with Hugging Face's Trainer: `python -m examples.train_huggingface --loss ours --steps 20`."""

import argparse
import functools
import tempfile

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from examples.common import BATCH, IGNORE, TIME, VOCAB
from examples.text import load_text
from torch_api import causal_lm_loss

# Nobody reads the logits after the loss, so their gradient may stand in their place.
LOSSES = {"ours": functools.partial(causal_lm_loss, donate_logits=True), "reference": None}


class Windows(Dataset):
    """Windows of the text; what they lack in length is no label, and any input."""

    def __init__(self, n_windows: int) -> None:
        self.windows = torch.from_numpy(load_text().batches(1, n_windows)[0][:, :TIME]).long()

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = self.windows[index]
        return {"input_ids": labels.clamp(min=0), "labels": labels, "attention_mask": (labels != IGNORE).long()}


def model() -> LlamaForCausalLM:
    """A Llama of 2 layers from its configuration: nothing is downloaded."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        max_position_embeddings=TIME,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return LlamaForCausalLM(config)


def train(loss: str, steps: int) -> list[float]:
    """The loss of every step; each is of two accumulated batches, divided by their labels together."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=BATCH // 2,
            gradient_accumulation_steps=2,
            max_steps=steps,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=model(), args=arguments, train_dataset=Windows(BATCH * steps), compute_loss_func=LOSSES[loss]
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loss", choices=LOSSES, default="ours")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    for step, loss in enumerate(train(options.loss, options.steps)):
        print(f"step {step} loss {loss:.6f}")


if __name__ == "__main__":
    main()
