"""Row operations on local arrays whose vocabulary is sharded over the mesh axes `names`; () where it is whole.

Each device runs `jax_api.launch` on its slice of the classes; the slices exchange two row vectors in statistics (one
maximum, one sum), two more for the argmax, and nothing in gradients.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_api import launch, reference
from jax_api.reference import Upstream
from jax_api.static import Part, Static, Stats

type Names = tuple[str, ...]


def sliced(names: Names) -> bool:
    """Whether the vocabulary is in pieces: over some mesh axis of more than one device."""
    return any(lax.axis_size(name) > 1 for name in names)


def part_of(logits: Array, names: Names) -> Part:
    """Which part of the vocabulary this device's slice is."""
    n_classes = logits.shape[-1]
    if not sliced(names):
        return Part(None, n_classes)
    return Part(n_classes * lax.axis_index(names).reshape(1), n_classes * lax.axis_size(names))


def stats(static: Static, names: Names, logits: Array, target: Array, weight: Array | None) -> Stats:
    """Statistics of whole rows: one read of the slice."""
    if not sliced(names):
        return _alike(launch.stats(static, logits, target, weight, part_of(logits, names)), names)
    # The z-loss is a function of the merged lse.
    slice_static = replace(static, options=replace(static.options, z_loss=0.0))
    out = _merge(launch.stats(slice_static, logits, target, weight, part_of(logits, names)), names)
    ignored = reference.ignored_rows(target, static.options)
    if static.options.z_loss:
        out = out._replace(loss=out.loss + jnp.where(ignored, 0.0, static.options.z_loss * out.lse**2))
    if out.predicted is not None:
        return out._replace(predicted=_merge_predicted(static, logits, out.predicted, names))
    return out._replace(lse=jnp.where(ignored, 0.0, out.lse))


def grad(static: Static, names: Names, logits: Array, target: Array, *upstream_and_weight):
    """The slice's dlogits (and dtarget), from the arrays of `Upstream` and the class weights."""
    *upstream, weight = upstream_and_weight
    return launch.grad(static, logits, target, weight, Upstream(*upstream), part_of(logits, names))


def fused(static: Static, names: Names, logits: Array, target: Array, denominator: Array, weight: Array | None):
    """Statistics of whole rows and the slice's dlogits: one launch where the vocabulary is whole."""
    if not sliced(names):
        out, dlogits = launch.fused(static, logits, target, weight, denominator)
        return _alike(out, names), dlogits
    # The gradient waits for the merged lse.
    out = stats(static, names, logits, target, weight)
    dlogits, _ = grad(static, names, logits, target, out.lse, out.target_sum, 1.0 / denominator, None, weight)
    return out, dlogits


def _alike(out: Stats, names: Names) -> Stats:
    """The same, as what is alike on all devices of axes that have one device each: shard_map wants it said."""
    return jax.tree.map(lambda array: lax.psum(array, names), out) if names else out


def _merge(out: Stats, names: Names) -> Stats:
    """The statistics of whole rows from those of slices: lse = log Σ exp(lse_j), loss = Σ loss_j + s_j·(lse − lse_j).

    Against the largest lse_j, so that a confident row keeps its small loss.
    """
    loss, lse, s, predicted = out
    top = lax.pmax(lse, names)
    base = jnp.where(top == -jnp.inf, 0.0, top)
    masked = lse == -jnp.inf
    # An ignored row, s = 0, may hold NaN.
    loss = loss + s * jnp.where(masked | (s == 0), 0.0, base - lse)
    # Mass on a slice of only masked classes: infinitely wrong, and undefined where the whole row is masked.
    wrong = jnp.where(top == -jnp.inf, jnp.nan, jnp.copysign(jnp.inf, s))
    loss = jnp.where(masked & (s != 0), wrong, loss)
    d, loss, s = lax.psum((jnp.exp(lse - base), loss, s), names)
    log_d = jnp.log(d)
    return Stats(loss + s * jnp.where(s == 0, 0.0, log_d), base + log_d, s, predicted)


def _merge_predicted(static: Static, logits: Array, predicted: Array, names: Names) -> Array:
    """The lowest class among those with the largest logit; NaN counts as the largest."""
    best = jnp.take_along_axis(logits, predicted[..., None], axis=-1)[..., 0].astype(reference.compute_dtype(logits))
    key = reference.predicted_key(best, static.options)
    key = jnp.where(jnp.isnan(key), jnp.inf, key)
    first = logits.shape[-1] * lax.axis_index(names)
    return lax.pmin(jnp.where(key == lax.pmax(key, names), first + predicted, jnp.iinfo(jnp.int32).max), names)


def tracks_varying(names: Names) -> bool:
    """Whether the shard_map over these mesh axes keeps track of what varies over them: check_vma=True."""
    return bool(launch.varying_axes(lax.axis_index(names)))
