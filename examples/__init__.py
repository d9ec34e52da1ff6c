"""The same small language model in Flax and in PyTorch, trained with one loss: `python -m examples.demo`."""
