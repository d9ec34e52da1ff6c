"""Bad input to linear heads: one clear error in three parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_api
import torch_api

HIDDEN, WEIGHT, LABELS = np.ones((7, 5)), np.ones((12, 5)), np.arange(7)

TORCH = {
    "another width": (
        lambda h, w, y: torch_api.linear_cross_entropy(h[:, 1:], w, y),
        ValueError,
        "got hidden float64[7, 4] with weight float64[12, 5]; required: hidden [..., D] and weight [V, D] with the "
        "same D; write hidden whose last axis has 5 entries",
    ),
    "weight the other way": (
        lambda h, w, y: torch_api.linear_cross_entropy(h, w.T, y),
        ValueError,
        "got hidden float64[7, 5] with weight float64[5, 12]; required: hidden [..., D] and weight [V, D] with the "
        "same D; write weight transposed (in JAX: class_axis=1)",
    ),
    "weight that is no matrix": (
        lambda h, w, y: torch_api.linear_cross_entropy(h, w[0], y),
        ValueError,
        "got weight float64[5]; required: a matrix [V, D]; write weight with two axes",
    ),
    "another dtype": (
        lambda h, w, y: torch_api.linear_cross_entropy(h, w.float(), y),
        TypeError,
        "got weight float32[12, 5] with hidden float64[7, 5]; required: one dtype, or autocast; "
        "write weight.to(hidden.dtype)",
    ),
    "bias of another length": (
        lambda h, w, y: torch_api.linear_cross_entropy(h, w, y, w[:3, 0]),
        ValueError,
        "got bias float64[3]; required: one bias a class: shape [12]; write bias of that shape, or None",
    ),
    "labels of another length": (
        lambda h, w, y: torch_api.linear_cross_entropy(h, w, y[1:]),
        ValueError,
        "got labels int64[6] with hidden @ weight.T float64[7, 12]; required: labels of shape [7] (class indices) or "
        "[7, 12] (probabilities); write labels with one entry a row, and the class axis where it is",
    ),
    "a budget below a row": (
        lambda h, w, y: torch_api.linear_cross_entropy(h, w, y, max_logits_bytes=95),
        ValueError,
        "got max_logits_bytes=95 for rows of 12 classes of 8 bytes; required: room for a row; "
        "write max_logits_bytes=96 or more",
    ),
    "a budget that is no integer": (
        lambda h, w, y: torch_api.linear_cross_entropy(h, w, y, max_logits_bytes=1e9),
        TypeError,
        "got max_logits_bytes of type float; required: an integer; write max_logits_bytes=629145600",
    ),
    "an unknown accumulation": (
        lambda h, w, y: torch_api.linear_cross_entropy(h, w, y, accumulation="bfloat16"),
        ValueError,
        "got accumulation='bfloat16'; required: 'float32' or 'parameter'; write accumulation='float32'",
    ),
    "trained class weights": (
        lambda h, w, y: torch_api.linear_cross_entropy(h, w, y, class_weight=torch.ones_like(w[:, 0]).requires_grad_()),
        ValueError,
        "got class_weight that requires a gradient; required: class weights that are not trained; "
        "write class_weight.detach()",
    ),
    "no tensor": (
        lambda h, w, y: torch_api.linear_cross_entropy(h.tolist(), w, y),
        TypeError,
        "got hidden of type list; required: a torch.Tensor; write torch.as_tensor(hidden)",
    ),
}

JAX = {
    "trained class weights": (
        lambda h, k, y: jax.grad(lambda w: jax_api.linear_cross_entropy(h, k, y, class_weight=w))(jnp.ones(12)),
        ValueError,
        "got class_weight that is differentiated; required: class weights that are not trained; "
        "write jax.lax.stop_gradient(class_weight)",
    ),
    "the other layout": (
        lambda h, k, y: jax_api.linear_cross_entropy(h, k, y, class_axis=0),
        ValueError,
        "got hidden float64[7, 5] with weight float64[5, 12]; required: hidden [..., D] and weight [V, D] with the "
        "same D; write weight transposed (in JAX: class_axis=1)",
    ),
    "no such layout": (
        lambda h, k, y: jax_api.linear_cross_entropy(h, k, y, class_axis=-1),
        ValueError,
        "got class_axis=-1; required: 0 for a weight [V, D] or 1 for a weight [D, V]; write class_axis=1",
    ),
    "integer logits": (
        lambda h, k, y: jax_api.linear_cross_entropy(h, k, y, dtype=jnp.int32),
        TypeError,
        "got dtype=int32; required: a floating point dtype: float16, bfloat16, float32, float64; write dtype=None",
    ),
    "a budget below a row": (
        lambda h, k, y: jax_api.linear_cross_entropy(h, k, y, max_logits_bytes=95),
        ValueError,
        "got max_logits_bytes=95 for rows of 12 classes of 8 bytes; required: room for a row; "
        "write max_logits_bytes=96 or more",
    ),
    "no array": (
        lambda h, k, y: jax_api.linear_cross_entropy([1.0], k, y),
        TypeError,
        "got hidden of type list; required: a JAX or NumPy array; write jnp.asarray(hidden)",
    ),
    "an axis name outside of shard_map": (
        lambda h, k, y: jax_api.linear_cross_entropy(h, k, y, axis_name="model"),
        ValueError,
        "got axis_name='model' where the manual mesh axes are []; required: mesh axes of a jax.shard_map around the "
        "call, over which the classes of the logits are sharded; write axis_name=None outside of shard_map: jit needs "
        "no help with sharded logits",
    ),
}


@pytest.mark.parametrize("name", TORCH)
def test_mistakes_in_torch(name):
    function, error, message = TORCH[name]
    with pytest.raises(error) as caught:
        function(*(torch.from_numpy(x) for x in (HIDDEN, WEIGHT, LABELS)))
    assert str(caught.value) == message


@pytest.mark.parametrize("name", JAX)
def test_mistakes_in_jax(name):
    function, error, message = JAX[name]
    with pytest.raises(error) as caught:
        function(jnp.asarray(HIDDEN), jnp.asarray(WEIGHT.T), jnp.asarray(LABELS))
    assert str(caught.value) == message


def test_a_symbolic_number_of_rows_in_jax():
    (rows,) = jax.export.symbolic_shape("rows")
    shapes = jax.ShapeDtypeStruct((rows, WEIGHT.shape[1]), WEIGHT.dtype), jax.ShapeDtypeStruct((rows,), LABELS.dtype)
    step = jax.jit(lambda hidden, labels: jax_api.linear_cross_entropy(hidden, jnp.asarray(WEIGHT.T), labels))
    with pytest.raises(
        ValueError, match=r"got hidden .*rows.*; required: sizes that are numbers.*; write a jax.export"
    ):
        jax.export.export(step)(*shapes)


def test_a_symbolic_width_is_none_of_the_chunks_business():
    (width,) = jax.export.symbolic_shape("width")
    shapes = [jax.ShapeDtypeStruct((n, width), jnp.float32) for n in (len(LABELS), 5)]
    step = jax.jit(lambda hidden, weight: jax_api.linear_cross_entropy(hidden, weight, LABELS % 5, class_axis=0))
    hidden, weight = jnp.ones((len(LABELS), 3), jnp.float32), jnp.ones((5, 3), jnp.float32)
    exported = jax.export.export(step)(*shapes)
    np.testing.assert_allclose(exported.call(hidden, weight), step(hidden, weight), rtol=1e-6)
