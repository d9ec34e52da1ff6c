"""Mixed precision, accumulation, patching, and the loss inside Hugging Face's Trainer and Lightning."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.conftest import HAS_GPU
from torch_api import causal_lm_loss, cross_entropy, for_causal_lm_loss, functional_cross_entropy, patch

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if HAS_GPU else "cpu"


@pytest.mark.parametrize("example", ["huggingface", "lightning"])
def test_trainers_train_alike_with_either_loss(example):
    pytest.importorskip({"huggingface": "accelerate", "lightning": "lightning"}[example])
    program = f"from examples.train_{example} import train; print(*train('ours', 3), *train('reference', 3))"
    command = [sys.executable, "-W", "ignore", "-c", program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    curves = np.array(result.stdout.splitlines()[-1].split(), dtype=float).reshape(2, -1)
    assert len(curves[0]) == 3
    assert curves[0][0] == pytest.approx(np.log(8192), rel=0.01)
    assert curves[0][-1] < curves[0][0]
    # Trainer logs four decimals in some versions.
    np.testing.assert_allclose(*curves, atol=2e-4)


def test_causal_lm_loss_is_the_shifted_mean():
    logits = torch.randn(2, 5, 16, device=DEVICE, requires_grad=True)
    labels = torch.randint(0, 16, (2, 5), device=DEVICE)
    labels[0, 3:] = -100
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss = causal_lm_loss(logits, labels)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(expected, logits)[0])
    tokens = (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(causal_lm_loss({"logits": logits}, labels, tokens), expected)
    with pytest.raises(TypeError, match=r"got labels=None; required: labels \[batch, time\]"):
        causal_lm_loss(logits, None)


def test_transformers_models_take_the_loss():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(DEVICE)
    tokens = torch.randint(0, 64, (2, 9), device=DEVICE)
    labels = tokens.clone()
    labels[0, :4] = -100
    mask = torch.ones_like(tokens)
    cases = ({"labels": labels}, {"labels": labels, "num_items_in_batch": torch.tensor(7)})
    cases += ({"labels": labels, "shift_labels": labels.roll(-1, 1)},)

    def step(**given):
        loss = model(tokens, attention_mask=mask, **given).loss
        return loss, *torch.autograd.grad(loss, list(model.parameters()))

    expected = [step(**case) for case in cases]
    calls = []
    model.loss_function = lambda **given: calls.append(given) or for_causal_lm_loss(**given)
    for case, right in zip(cases, expected, strict=True):
        torch.testing.assert_close(step(**case), right)
    assert len(calls) == len(cases)
    smoothed = for_causal_lm_loss(**calls[0], label_smoothing=0.1)
    assert smoothed > for_causal_lm_loss(**calls[0])
    with pytest.raises(ValueError, match="got vocab_size=63 with logits of 64 classes"):
        for_causal_lm_loss(**{**calls[0], "vocab_size": 63})
    with pytest.raises(TypeError, match=r"got labels=None; required: labels \[batch, time\]"):
        for_causal_lm_loss(**{**calls[0], "labels": None})


def test_gradient_accumulation_is_exact_whatever_the_batches_hold():
    torch.manual_seed(0)
    model = nn.Linear(8, 30).to(DEVICE)
    hidden, labels = torch.randn(4, 6, 8, device=DEVICE), torch.randint(0, 30, (4, 6), device=DEVICE)
    labels[0, 1:] = -100
    whole = cross_entropy(model(hidden), labels, dim=-1)
    expected = torch.autograd.grad(whole, model.parameters())
    tokens = (labels != -100).sum()
    for part, part_labels in zip(hidden, labels, strict=True):
        cross_entropy(model(part), part_labels, denominator=tokens).backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    torch.manual_seed(0)
    model = nn.Linear(8, 30).to(DEVICE)
    hidden, labels = torch.randn(6, 8, device=DEVICE), torch.randint(0, 30, (6,), device=DEVICE)
    with torch.autocast(DEVICE, dtype=dtype):
        logits = model(hidden)
        assert logits.dtype == dtype
        loss = cross_entropy(logits, labels)
        expected = F.cross_entropy(logits.float(), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(x, model.weight, retain_graph=True)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-4)


def test_grad_scaler():
    torch.manual_seed(0)
    model = nn.Linear(8, 1000).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**16)
    hidden, labels = torch.randn(6, 8, device=DEVICE), torch.randint(0, 1000, (6,), device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.float16):
        logits = model(hidden)
        # Half of the mean's gradients would vanish below fp16's range without the scale.
        loss = cross_entropy(logits, labels, denominator=4096.0)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    expected = torch.autograd.grad(cross_entropy(model(hidden).float(), labels, denominator=4096.0), model.weight)[0]
    assert torch.count_nonzero(model.weight.grad) == model.weight.grad.numel()
    torch.testing.assert_close(model.weight.grad, expected, rtol=3e-2, atol=1e-6)
    scaler.step(optimizer)
    scaler.update()


def test_patch_replaces_and_restores():
    theirs = F.cross_entropy
    logits, labels, weight = torch.randn(4, 5), torch.tensor([0, 4, -100, 2]), torch.rand(5)
    expected = nn.CrossEntropyLoss(weight, label_smoothing=0.1)(logits, labels)
    with patch():
        assert F.cross_entropy is not theirs
        torch.testing.assert_close(nn.CrossEntropyLoss(weight, label_smoothing=0.1)(logits, labels), expected)
        assert F.cross_entropy(logits.bfloat16(), labels).dtype == torch.float32
        with patch():
            pass
        assert F.cross_entropy is not theirs
        with pytest.warns(UserWarning, match="size_average and reduce are deprecated"):
            rows = F.cross_entropy(logits, labels, None, None, -100, False)
        torch.testing.assert_close(rows, theirs(logits, labels, reduction="none"))
        with pytest.warns(UserWarning, match="write reduction"):
            assert F.cross_entropy(logits, labels, reduce=0).shape == (4,)
        with pytest.warns(UserWarning, match="write reduction"):
            total = F.cross_entropy(logits, labels, None, False)
        torch.testing.assert_close(total, theirs(logits, labels, reduction="sum"))
    assert F.cross_entropy is theirs
    with pytest.raises(RuntimeError, match="stop"), patch():
        raise RuntimeError("stop")
    assert F.cross_entropy is theirs


@pytest.mark.parametrize("count", [torch.tensor(7), torch.tensor([7]), torch.tensor([[7.0]]), torch.full((2, 1), 7)])
def test_the_count_is_one_however_often_it_is_repeated(count):
    """As transformers' Trainer hands it to replicas: [replicas, 1], and [1, 1] to each."""
    logits, labels = torch.randn(2, 5, 8), torch.randint(0, 8, (2, 5))
    expected = causal_lm_loss(logits, labels, 7)
    torch.testing.assert_close(causal_lm_loss(logits, labels, count), expected)
    torch.testing.assert_close(for_causal_lm_loss(logits, labels, 8, count), expected)


def test_patches_that_overlap_restore_at_the_last_ones_end():
    theirs, first, second = F.cross_entropy, patch(), patch()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert F.cross_entropy is functional_cross_entropy
    second.__exit__(None, None, None)
    assert F.cross_entropy is theirs
    with patch():
        F.cross_entropy = another = lambda *_: None  # not by monkeypatch, which would bring ours back after the test
        with patch():
            assert F.cross_entropy is functional_cross_entropy
        assert F.cross_entropy is another
    assert F.cross_entropy is theirs


def test_who_overrides_pytorchs_function_is_asked_under_patch():
    theirs = F.cross_entropy

    class Overriding(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return "mine" if func is theirs else super().__torch_function__(func, types, args, kwargs or {})

    class Tagged(torch.Tensor):
        pass

    logits, labels = torch.randn(2, 5).bfloat16(), torch.tensor([0, 4])
    with patch():
        assert F.cross_entropy(logits.as_subclass(Overriding), labels) == "mine"
        assert F.cross_entropy(logits.as_subclass(Tagged), labels).dtype == torch.float32


@pytest.mark.parametrize("outputs", [(torch.zeros(1, 2, 3),), None, {"logits": None}])
def test_outputs_without_logits_say_so_whatever_the_count(outputs):
    with pytest.raises(TypeError, match="got input of type"):
        causal_lm_loss(outputs, torch.zeros(1, 2, dtype=torch.int64), torch.tensor(4))
