"""The text: Python's own language reference, which CPython carries as `pydoc_data.topics` (PSF licence)."""

from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.common import BATCH, IGNORE, TIME, VOCAB


class Text(NamedTuple):
    tokenizer: Tokenizer
    topics: list[str]  # [windows], the topic that each window is from
    windows: np.ndarray  # [windows, time + 1] int32, short windows filled up with IGNORE

    def batches(self, steps: int, batch: int = BATCH, seed: int = 0) -> np.ndarray:
        """Windows in random order, each once per epoch: int32 [steps, batch, time + 1]."""
        generator = np.random.default_rng(seed)
        epochs = -(-steps * batch // len(self.windows))
        order = np.concatenate([generator.permutation(len(self.windows)) for _ in range(epochs)])
        return self.windows[order[: steps * batch].reshape(steps, batch)]


def load_text() -> Text:
    """The language reference, cut into windows that never cross from one topic into the next."""
    tokenizer = train_tokenizer([topics[name] for name in sorted(topics)])
    names, windows = [], []
    for name in sorted(topics):
        tokens = np.array(tokenizer.encode(topics[name]).ids, dtype=np.int32)
        # The last token of a window is the first of the next: it is a label there and an input here.
        for start in range(0, len(tokens) - 1, TIME):
            window = tokens[start : start + TIME + 1]
            names.append(name)
            windows.append(np.pad(window, (0, TIME + 1 - len(window)), constant_values=IGNORE))
    return Text(tokenizer, names, np.stack(windows))


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE vocabulary of exactly VOCAB tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB:
        raise ValueError(f"the text gave {tokenizer.get_vocab_size()} tokens, the model needs {VOCAB}")
    return tokenizer
