"""Bad input: one clear error in three parts, the same words in both front ends where the mistake is the same."""

from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_api
import torch_api

LOGITS, LABELS, SOFT = np.zeros((4, 7), np.float32), np.zeros(4, np.int64), np.full((4, 7), 1 / 7, np.float32)


class TorchCall:
    names: ClassVar = {"logits": "input", "labels": "target"}

    def __call__(self, logits, labels, weight=None, **options):
        as_tensor = lambda x: torch.from_numpy(x) if isinstance(x, np.ndarray) else x  # noqa: E731
        options = {k: as_tensor(v) for k, v in options.items()}
        options |= {"dim": options.pop("axis")} if "axis" in options else {"dim": -1}
        return torch_api.cross_entropy(as_tensor(logits), as_tensor(labels), as_tensor(weight), **options)


class JaxCall:
    names: ClassVar = {"logits": "logits", "labels": "labels"}

    def __call__(self, logits, labels, weight=None, **options):
        return jax_api.cross_entropy(logits, labels, weight, **options)


each_call = pytest.mark.parametrize("call", [TorchCall(), JaxCall()], ids=["torch", "jax"])

# (arguments, error, message with {logits} and {labels} for the front end's names)
MISTAKES = {
    "unknown reduction": (
        {"reduction": "avg"},
        ValueError,
        "got reduction='avg'; required: 'none', 'mean' or 'sum'; write reduction='mean'",
    ),
    "scalar logits": (
        {"logits": np.ones((), np.float32), "labels": np.zeros((), np.int64)},
        ValueError,
        "got {logits} float32[]; required: a class axis; write {logits} of shape [rows, classes]",
    ),
    "no classes": (
        {"logits": np.zeros((4, 0), np.float32)},
        ValueError,
        "got {logits} float32[4, 0]; required: at least one class; write {logits} with a class axis longer than 0",
    ),
    "class axis out of range": (
        {"axis": 2},
        ValueError,
        "got class axis 2 for {logits} float32[4, 7]; required: an axis in [-2, 2); write -1 for classes last",
    ),
    "class axis that is no integer": (
        {"axis": "last"},
        TypeError,
        "got class axis 'last'; required: an integer; write -1 for classes last",
    ),
    "mismatched batch": (
        {"labels": np.zeros(5, np.int64)},
        ValueError,
        "got {labels} int64[5] with {logits} float32[4, 7]; required: {labels} of shape [4] (class indices) or [4, 7] "
        "(probabilities); write {labels} with one entry a row, and the class axis where it is",
    ),
    "wrong rank": (
        {"labels": np.zeros((4, 1), np.int64)},
        ValueError,
        "got {labels} int64[4, 1] with {logits} float32[4, 7]; required: {labels} of shape [4] (class indices) or "
        "[4, 7] (probabilities); write {labels} with one entry a row, and the class axis where it is",
    ),
    "float class indices": (
        {"labels": np.zeros(4, np.float32)},
        TypeError,
        "got {labels} float32[4]; required: integer class indices; write {labels} as int32 or int64",
    ),
    "boolean class indices": (
        {"labels": np.zeros(4, bool)},
        TypeError,
        "got {labels} bool[4]; required: integer class indices; write {labels} as int32 or int64",
    ),
    "integer probabilities": (
        {"labels": np.zeros((4, 7), np.int64)},
        TypeError,
        "got {labels} int64[4, 7], of the shape of {logits}; required: floating point class probabilities in that "
        "shape; write {labels} of shape [4] for class indices",
    ),
    "integer logits": (
        {"logits": np.zeros((4, 7), np.int32)},
        TypeError,
        "got {logits} int32[4, 7]; required: floating point {logits}: float16, bfloat16, float32, float64; "
        "write {logits} as float32",
    ),
    "smoothing above 1": (
        {"label_smoothing": 1.5},
        ValueError,
        "got label_smoothing=1.5; required: a number in [0, 1]; write label_smoothing=0.1",
    ),
    "smoothing NaN": (
        {"label_smoothing": float("nan")},
        ValueError,
        "got label_smoothing=nan; required: a number in [0, 1]; write label_smoothing=0.1",
    ),
    "negative z_loss": (
        {"z_loss": -1.0},
        ValueError,
        "got z_loss=-1.0; required: a finite number ≥ 0; write z_loss=1e-4",
    ),
    "softcap 0": (
        {"softcap": 0.0},
        ValueError,
        "got softcap=0.0; required: a finite number > 0, or None; write softcap=None for no cap",
    ),
    "infinite scale": (
        {"logit_scale": float("inf")},
        ValueError,
        "got logit_scale=inf; required: a finite number; write logit_scale=1.0",
    ),
    "a string for a number": (
        {"z_loss": "1e-4"},
        TypeError,
        "got z_loss of type str; required: a Python number; write z_loss=1e-4",
    ),
    "fractional ignore_index": (
        {"ignore_index": 0.5},
        TypeError,
        "got ignore_index=0.5; required: an integer; write ignore_index=-100",
    ),
    "weight of the wrong length": (
        {"weight": np.ones(6, np.float32)},
        ValueError,
        "got weight float32[6]; required: one weight a class: shape [7]; write weight of that shape, or None",
    ),
    "integer weight": (
        {"weight": np.ones(7, np.int32)},
        TypeError,
        "got weight int32[7]; required: floating point class weights; write weight as float32",
    ),
    "soft targets with ignore_index": (
        {"labels": SOFT, "ignore_index": 3},
        ValueError,
        "got ignore_index=3 with soft targets; required: class indices, which alone can be ignored; "
        "write zeros in the rows of {labels} to leave out",
    ),
    "denominator per row": (
        {"denominator": np.ones(4, np.float32)},
        ValueError,
        "got denominator float32[4]; required: one number; write denominator.sum() if it holds counts to be added",
    ),
    "boolean denominator": (
        {"denominator": np.ones((), bool)},
        TypeError,
        "got denominator bool[]; required: a number; write denominator as float32",
    ),
    "denominator True": (
        {"denominator": True},
        TypeError,
        "got denominator of type bool; required: a number or an array of one; write denominator=float(count)",
    ),
    "denominator with sum": (
        {"denominator": 3.0, "reduction": "sum"},
        ValueError,
        "got denominator with reduction='sum'; required: reduction='mean', whose divisor it replaces; "
        "write reduction='mean'",
    ),
    "unknown implementation": (
        {"implementation": "cuda"},
        ValueError,
        "got implementation='cuda'; required: 'triton', 'reference' or None; "
        "write implementation=None to choose by device",
    ),
}


@each_call
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(call, mistake):
    arguments, kind, message = MISTAKES[mistake]
    arguments = {"logits": LOGITS, "labels": LABELS, **arguments}
    with pytest.raises(kind) as caught:
        call(**arguments)
    assert str(caught.value) == message.format(**call.names)


@each_call
def test_correct_call_passes(call):
    assert float(call(LOGITS, LABELS)) == pytest.approx(np.log(7))
    assert float(call(LOGITS, SOFT)) == pytest.approx(np.log(7))


def test_not_an_array():
    with pytest.raises(
        TypeError, match=r"got input of type list; required: a torch.Tensor; write torch.as_tensor\(input\)"
    ):
        torch_api.cross_entropy([[1.0]], torch.zeros(1, dtype=torch.long))
    with pytest.raises(TypeError, match=r"got logits of type list; required: a JAX or NumPy array"):
        jax_api.cross_entropy([[1.0]], jnp.zeros(1, int))


def test_tensors_for_options_are_refused_because_their_gradient_would_be_lost():
    with pytest.raises(TypeError, match="got logit_scale of type Tensor; required"):
        torch_api.cross_entropy(torch.zeros(1, 2), torch.tensor([0]), logit_scale=torch.tensor(2.0))
    with pytest.raises(TypeError, match="got logit_scale of type ArrayImpl; required: a Python number"):
        jax_api.cross_entropy(jnp.zeros((1, 2)), jnp.array([0]), logit_scale=jnp.array(2.0))


def test_tensors_on_different_devices():
    logits, labels = torch.zeros(4, 7), torch.zeros(4, dtype=torch.long)
    for name, arguments in (
        ("target", {"target": labels.to("meta")}),
        ("weight", {"target": labels, "weight": torch.ones(7, device="meta")}),
    ):
        message = rf"got {name} on meta with input on cpu; required: one device; write {name}.to\(input.device\)"
        with pytest.raises(ValueError, match=message):
            torch_api.cross_entropy(logits, **arguments)


def test_module_checks_its_options_when_it_is_made():
    with pytest.raises(ValueError, match=r"got label_smoothing=2\.0"):
        torch_api.CrossEntropyLoss(label_smoothing=2.0)
    with pytest.raises(ValueError, match="got reduction='avg'"):
        torch_api.CrossEntropyLoss(reduction="avg")


def test_kernels_without_a_gpu_or_an_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    required = "an NVIDIA GPU, or Triton's interpreter"
    message = rf"got implementation='triton' .*; required: {required} .*; write implementation=None"
    with pytest.raises(RuntimeError, match=message):
        torch_api.cross_entropy(torch.zeros(1, 2), torch.tensor([0]), implementation="triton")


@pytest.mark.skipif(jnp.zeros(1).devices().pop().platform == "gpu", reason="needs a host without a GPU")
def test_kernels_without_a_gpu_or_an_interpreter_in_jax(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    message = "got implementation='triton' on the cpu backend; required: a GPU, or Triton's interpreter"
    with pytest.raises(RuntimeError, match=message):
        jax_api.cross_entropy(jnp.zeros((1, 2)), jnp.array([0]), implementation="triton")


def test_kernels_with_versions_that_do_not_go_together(monkeypatch):
    from jax_api import backend

    monkeypatch.setattr(backend, "_obstacle", lambda: "jax 0.13.0 and jax-triton 0.4.1")
    with pytest.raises(
        RuntimeError, match=r"with jax 0\.13\.0 and jax-triton 0\.4\.1; required: jax 0\.11 or 0\.12 with jax-triton"
    ):
        jax_api.cross_entropy(jnp.zeros((1, 2)), jnp.array([0]), implementation="triton")
    monkeypatch.setattr(backend.jax, "default_backend", lambda: "gpu")
    with pytest.raises(RuntimeError, match=r"got a GPU backend with jax 0\.13\.0 and jax-triton 0\.4\.1"):
        jax_api.cross_entropy(jnp.zeros((1, 2)), jnp.array([0]))
    assert jax_api.cross_entropy(jnp.zeros((1, 2)), jnp.array([0]), implementation="reference") > 0
