"""The examples as a user runs them: one process per command, without a GPU and without Triton's interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_text():
    from examples.common import IGNORE, TIME, VOCAB
    from examples.text import load_text, topics

    text, again = load_text(), load_text()
    np.testing.assert_array_equal(text.batches(3), again.batches(3))
    assert text.batches(3).shape == (3, 8, TIME + 1)
    assert text.windows[:, :-1].max() < VOCAB
    assert (text.windows[:, 1:] == IGNORE).any()
    for name in ("assert", "objects"):
        mine = text.windows[[topic == name for topic in text.topics]]
        tokens = [*mine[0, :1], *mine[:, 1:].flat]
        assert text.tokenizer.decode([token for token in tokens if token != IGNORE]) == topics[name]


def test_demo(tmp_path):
    picture = tmp_path / "curves.png"
    result = run("-m", "examples.demo", "--steps", "3", "--out", picture)
    assert result.returncode == 0, result.stderr
    table = np.array([line.split() for line in result.stdout.splitlines() if re.match(r" +\d", line)], dtype=float)
    losses = table[:, 1:5]
    assert losses.shape == (3, 4)
    np.testing.assert_allclose(losses[0], np.log(8192), rtol=0.01)
    assert (losses[-1] < losses[0] - 0.1).all()
    assert picture.read_bytes().startswith(b"\x89PNG")


WRONG_DIVISOR = """
import torch.nn.functional as F

def cross_entropy(input, target, *, dim):
    return F.cross_entropy(input.flatten(0, 1), target.flatten(), reduction="sum") / target.numel()
"""


def test_demo_fails_with_a_wrong_loss(tmp_path):
    (tmp_path / "torch_api.py").write_text(WRONG_DIVISOR)
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from examples.demo import main; sys.exit(main())"
    result = run("-c", program, "--steps", "1", "--out", tmp_path / "curves.png")
    assert result.returncode == 1
    assert "BEYOND the tolerance" in result.stdout, result.stderr


@pytest.mark.parametrize(("last_loss", "status"), [(8.0, 0), (8.00005, 0), (8.0002, 1), (float("nan"), 1)])
def test_demo_tolerance(tmp_path, monkeypatch, last_loss, status):
    from examples import demo

    losses = iter([9.0, 8.0] * 3 + [9.0, last_loss])
    monkeypatch.setattr(demo, "run", lambda module, loss, weights, batches: (next(losses) for _ in batches))
    monkeypatch.setattr(sys, "argv", ["demo", "--steps", "2", "--out", str(tmp_path / "curves.png")])
    assert demo.main() == status


def test_per_sample():
    perplexities = []
    for framework in ("torch", "jax"):
        result = run("-m", f"examples.per_sample_{framework}", "--steps", "1")
        assert result.returncode == 0, result.stderr
        assert "gradient within" in result.stdout
        perplexities.append(int(re.findall(r"perplexity +(\d+)", result.stdout)[0]))
    np.testing.assert_allclose(*perplexities, rtol=1e-3)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_linear_head(framework):
    result = run("-m", "examples.linear_head", "--framework", framework, "--rows", "300", "--classes", "500")
    assert result.returncode == 0, result.stderr
    losses = re.search(r"loss: (\S+) from whole logits, (\S+) in chunks", result.stdout)
    assert losses is not None
    assert losses[1] == losses[2]
    errors = [float(error) for error in re.findall(r"within (\S+) of", result.stdout)]
    assert len(errors) == 2
    assert max(errors) < 1e-5
