"""Cross-entropy of a linear head without its logits. The formula stands in `ce_kernels.spec`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from ce_kernels import Options
from ce_kernels.checks import FLOATS, Facts, check_target, check_weight
from ce_kernels.linear import MAX_LOGITS_BYTES, Accumulation, check_chunking, check_linear
from ce_kernels.spec import Implementation, Reduction, check_reduction, fail
from jax_api.backend import choose_implementation
from jax_api.launch import vary, varying_axes
from jax_api.linear_chunks import Head, LinearStatic
from jax_api.linear_rules import jitted_loss, jitted_rows
from jax_api.linear_sharding import aligned, varied
from jax_api.losses import RowOutputs, _divisor, _index_rows, _names, _Rows, as_array, facts_of
from jax_api.reference import is_soft
from jax_api.rules import in_reverse_mode
from jax_api.static import Static


def linear_cross_entropy(
    hidden: ArrayLike,
    weight: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None = None,
    class_weight: ArrayLike | None = None,
    *,
    class_axis: int = 1,
    dtype: DTypeLike | None = None,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    denominator: ArrayLike | None = None,
    max_logits_bytes: int = MAX_LOGITS_BYTES,
    accumulation: Accumulation = "float32",
    axis_name: str | tuple[str, ...] | None = None,
    implementation: Implementation | None = None,
) -> Array:
    r"""`jax_api.cross_entropy(hidden @ weight + bias, labels)`, from chunks of logits.

    First derivatives never hold more than a chunk; second ones hold whole logits.

    `mean` and `sum` compute the gradients in the forward pass, with three matmuls in all; `none`, float16, and
    gradients of soft labels compute the logits again in the backward pass. What is not differentiated (a frozen head,
    a frozen body) costs no matmul; without any gradient it is one matmul.

    Args:
        hidden: [..., D], float16, bfloat16, float32 or float64.
        weight: [D, V] as Flax keeps kernels; with class_axis=0 [V, D], an embedding table or a PyTorch weight.
        labels: class indices [...] (integers), or class probabilities [..., V].
        bias: [V], or None.
        class_weight: [V], floating point: `weight` of `jax_api.cross_entropy`. It gets no gradient: ValueError.
        class_axis: the axis of weight that counts the classes, 1 or 0.
        dtype: what hidden, weight and bias are cast to, as in Flax layers, and the logits' dtype; None promotes them.
            Gradients arrive in the dtypes of hidden, weight and bias.
        ignore_index: this and the options up to denominator, and implementation, are those of
            `jax_api.cross_entropy`, with the same formula.
        reduction: "none", "mean" or "sum".
        label_smoothing: α in [0, 1].
        z_loss: λ ≥ 0, the weight of lse².
        softcap: c > 0, or None.
        logit_scale: an inverse temperature.
        denominator: replaces the divisor of `mean`.
        max_logits_bytes: the most that a chunk of logits may take: rows are split into equal chunks, multiples of 128
            where that is possible. Chunks only change the rounding of the weight's gradient.
        accumulation: how the chunks of the gradients of weight are added up. "float32": in a float32 copy of it (which
            is the gradient itself where weight is float32). "parameter": in weight's dtype, with no copy; every chunk
            rounds the sum once, so bfloat16 gradients have about √((chunks + 1) / 2) times the error of one rounding.
        axis_name: inside `jax.shard_map`, the mesh axes over which the classes of weight, bias, class_weight and soft
            labels are sharded, in equal slices in the axes' order. hidden and labels are whole on each of them.
        implementation: "triton", "reference" or None to choose by platform when the program is lowered.

    Returns:
        As `jax_api.cross_entropy` of logits in `dtype`: float32 (float64 for float64).

    Raises:
        TypeError, ValueError: as `jax_api.cross_entropy`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> hidden, kernel = jnp.eye(3), jnp.zeros((3, 4))
        >>> loss, dkernel = jax.value_and_grad(linear_cross_entropy, argnums=1)(hidden, kernel, jnp.array([0, 3, -100]))
        >>> round(float(loss), 4)
        1.3863
        >>> dkernel[:, 0].tolist()
        [-0.375, 0.125, 0.0]

    Source: the contract in `ce_kernels.spec`.
    """
    check_reduction(reduction, denominator)
    options = Options.checked(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    head = _arrays(hidden, weight, labels, bias, class_weight)
    choices = _Choices(class_axis, dtype, max_logits_bytes, accumulation, axis_name, implementation)
    static = _static(head, options, choices)
    rows = _rows(head, static)
    if reduction == "none":
        return in_reverse_mode(jitted_rows, static, rows).loss
    divisor = _divided_by(rows, static, 1.0 if reduction == "sum" else denominator)
    if static.dtype == jnp.float16:
        # Loss scaling exists because p / N is below fp16's range: round only after the upstream gradient is known.
        return in_reverse_mode(jitted_rows, static, rows).loss.sum() / divisor
    return in_reverse_mode(jitted_loss, static, rows, divisor)


def linear_cross_entropy_rows(
    hidden: ArrayLike,
    weight: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None = None,
    class_weight: ArrayLike | None = None,
    *,
    class_axis: int = 1,
    dtype: DTypeLike | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    max_logits_bytes: int = MAX_LOGITS_BYTES,
    accumulation: Accumulation = "float32",
    axis_name: str | tuple[str, ...] | None = None,
    implementation: Implementation | None = None,
) -> RowOutputs:
    r"""Per-row loss, lse and argmax of `hidden @ weight + bias`, without the logits: log-probabilities, RL, accuracy.

    The same as `jax_api.cross_entropy_rows` of the logits, with the arguments of `linear_cross_entropy`. loss and lse
    are differentiable, together or alone; the backward pass computes the logits again.

    Returns:
        RowOutputs(loss, lse, predicted) in the shape of the rows: float32 (float64 for float64), int32.

    Raises:
        TypeError, ValueError: as `jax_api.cross_entropy`.

    Example:
        >>> import jax.numpy as jnp
        >>> rows = linear_cross_entropy_rows(jnp.eye(2), jnp.eye(2), jnp.array([0, 0]))
        >>> [round(float(p), 4) for p in jnp.exp(-rows.loss)], rows.predicted.tolist()
        ([0.7311, 0.2689], [0, 1])

    Source: the contract in `ce_kernels.spec`.
    """
    options = Options.checked(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    head = _arrays(hidden, weight, labels, bias, class_weight)
    choices = _Choices(class_axis, dtype, max_logits_bytes, accumulation, axis_name, implementation)
    static = _static(head, options, choices, with_argmax=True)
    out = in_reverse_mode(jitted_rows, static, _rows(head, static))
    return RowOutputs(out.loss, out.lse, out.predicted)  # pyright: ignore


def _arrays(
    hidden: ArrayLike, weight: ArrayLike, labels: ArrayLike, bias: ArrayLike | None, class_weight: ArrayLike | None
) -> Head:
    return Head(
        as_array("hidden", hidden),
        as_array("weight", weight),
        None if bias is None else as_array("bias", bias),
        as_array("labels", labels),
        None if class_weight is None else as_array("class_weight", class_weight),
    )


class _Choices(NamedTuple):
    """The arguments that are no arrays and no options of a row."""

    class_axis: int
    dtype: DTypeLike | None
    max_logits_bytes: int
    accumulation: str
    axis_name: str | tuple[str, ...] | None
    implementation: str | None


def _static(head: Head, options: Options, choices: _Choices, *, with_argmax: bool = False) -> LinearStatic:
    """What is known without data, after checking the arrays."""
    check_chunking(choices.max_logits_bytes, choices.accumulation)
    hidden, weight = facts_of("hidden", head.hidden), facts_of("weight", head.weight)
    bias = None if head.bias is None else facts_of("bias", head.bias)
    n_classes = check_linear(hidden, weight, bias, choices.class_axis)
    if not all(isinstance(size, int) for size in (*hidden.shape[:-1], n_classes)):
        needed = "sizes that are numbers, since chunks of rows are counted when the program is traced"
        fail(ValueError, f"{hidden} with {weight}", needed, "a jax.export of every size, or the loss of whole logits")
    promoted = jnp.result_type(*(x.dtype for x in head[:3] if x is not None))
    dtype = jnp.dtype(promoted if choices.dtype is None else choices.dtype)
    if dtype.name not in FLOATS:
        fail(TypeError, f"dtype={dtype.name}", f"a floating point dtype: {', '.join(FLOATS)}", "dtype=None")
    logits = Facts("hidden @ weight", (*hidden.shape[:-1], n_classes), dtype.name)
    soft = check_target(logits, facts_of("labels", head.target), len(logits.shape) - 1, options)
    if head.class_weight is not None:
        check_weight(facts_of("class_weight", head.class_weight), n_classes)
    if not soft:
        options = options.for_labels(_index_rows(head.target).dtype.name)
    implementation = choose_implementation(choices.implementation)
    rows = Static(options, implementation, with_argmax, _names(choices.axis_name))
    return LinearStatic(rows, choices.class_axis, choices.max_logits_bytes, choices.accumulation, dtype)


def _rows(head: Head, static: LinearStatic) -> Head:
    """The arrays sharded alike, varying over the same mesh axes: gradients are summed over those an array lacks."""
    if not is_soft(head.target):
        head = head._replace(target=_index_rows(head.target))
    return varied(aligned(static, head), *(lax.axis_index(name) for name in static.rows.axis_name))


def _divided_by(head: Head, static: LinearStatic, denominator: ArrayLike | None) -> Array:
    """The 0-d divisor of `mean`."""
    n_classes = head.weight.shape[static.class_axis]
    logits: Any = jax.ShapeDtypeStruct((*head.hidden.shape[:-1], n_classes), static.dtype)
    rows = _Rows(logits, head.target, head.class_weight, static.rows.options, head.hidden.shape[:-1])
    names = static.rows.axis_name
    return vary(_divisor(rows, denominator, names), varying_axes(head.hidden) - set(names))
