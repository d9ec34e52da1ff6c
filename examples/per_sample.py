"""What the two per-sample examples share once losses are NumPy arrays: the sample of the text, and the report."""

import numpy as np

from examples.common import IGNORE
from examples.text import Text


def sample(text: Text, every: int = 20) -> Text:
    """Every 20th window, so that each topic of the reference shows up about as often as it is long."""
    return Text(text.tokenizer, text.topics[::every], text.windows[::every])


def balanced_weights(text: Text) -> np.ndarray:
    """Weights [windows, time] under which all topics count the same, however long; 0 where there is no label."""
    labelled = text.windows[:, 1:] != IGNORE
    topics, topic = np.unique(text.topics, return_inverse=True)
    labels_of_topic = np.bincount(topic, weights=labelled.sum(axis=1), minlength=len(topics))
    return (labelled / labels_of_topic[topic][:, None]).astype(np.float32)


def report(text: Text, loss: np.ndarray, lse: np.ndarray, predicted: np.ndarray, *, shown: int = 4) -> None:
    """Perplexity and accuracy by topic, and the hardest tokens, from the per-token arrays [windows, time]."""
    labels = text.windows[:, 1:]
    labelled = labels != IGNORE
    correct = (predicted == labels) & labelled
    count = labelled.sum()
    perplexity, accuracy = np.exp(loss.sum() / count), correct.sum() / count
    print(f"{count} tokens of {len(labels)} windows: perplexity {perplexity:.0f}, accuracy {accuracy:.1%}")
    print(f"log-partition lse {lse[labelled].mean():.2f} ± {lse[labelled].std():.2f} (what a z-loss would hold near 0)")

    topics, topic = np.unique(text.topics, return_inverse=True)
    counts, losses, hits = (
        np.bincount(topic, weights=values.sum(axis=1), minlength=len(topics)) for values in (labelled, loss, correct)
    )
    order = np.argsort(losses / counts)
    for title, rows in (("easiest", order[:shown]), ("hardest", order[::-1][:shown])):
        print(f"\n{title} topics:")
        for row in rows:
            perplexity, accuracy = np.exp(losses[row] / counts[row]), hits[row] / counts[row]
            print(f"  {topics[row]:24} perplexity {perplexity:6.0f}   accuracy {accuracy:6.1%}")

    print("\nhardest tokens:")
    for position in np.argsort(loss, axis=None)[::-1][:shown]:
        window, time = np.unravel_index(position, loss.shape)
        context = text.tokenizer.decode(text.windows[window, max(0, time - 9) : time + 1].tolist())
        token, guess = (text.tokenizer.decode([int(ids[window, time])]) for ids in (labels, predicted))
        print(f"  {loss[window, time]:5.2f} nats   {context[-40:]!r} → {token!r}, predicted {guess!r}")


def check_gradient(ours: np.ndarray, plain: np.ndarray, rtol: float = 1e-4) -> None:
    """Every element, the tiny ones of classes far from the label too: hence no absolute tolerance to hide them."""
    np.testing.assert_allclose(ours, plain, rtol=rtol, atol=1e-12)
    print(f"focal loss: gradient within {rtol:g} of autodiff of the plain formula, {ours.size} elements")
