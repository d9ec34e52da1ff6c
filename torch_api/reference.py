"""The contract in plain PyTorch operations: the implementation on CPUs, and the rule of second derivatives.

`stats` and `grad` mirror the kernels: rows [N, V], row vectors [N], the formula of `ce_kernels.spec`, with q split into
a hard label's own mass and the mass that is spread over all classes. Both are differentiable, in every mode.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ce_kernels import Options
from torch_api.rows import Inputs, RowSpec, Stats, Upstream


def compute_dtype(logits: Tensor) -> torch.dtype:
    """fp64 for fp64 logits, fp32 for every other dtype."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def stats(inputs: Inputs, spec: RowSpec, with_argmax: bool) -> Stats:
    """loss, lse, s = Σq and (with_argmax) argmax per row; lse of ignored rows is 0 unless with_argmax."""
    options = spec.options
    r = inputs.logits.to(compute_dtype(inputs.logits))
    x, _ = _transform(r, options)
    m = x.detach().amax(-1, keepdim=True)
    m = torch.where(m == -torch.inf, 0.0, m)
    log_d = (x - m).exp_().sum(-1).log()
    m = m.squeeze(-1)
    label, spread = _targets(x, inputs, spec)
    # Against the row's maximum, so that a confident row keeps its small loss; no 0·∞ at masked classes.
    s = label.mass
    loss = s * (m - torch.where((label.x == -torch.inf) & (s == 0), m, label.x))
    if spread is not None:
        q = spread.expand_as(x)
        s = s + q.sum(-1)
        loss = loss + (q * (m[:, None] - torch.where((x == -torch.inf) & (q == 0), m[:, None], x))).sum(-1)
    loss = loss + s * torch.where((s == 0) & (log_d == -torch.inf), 0.0, log_d)
    lse = m + log_d
    if options.z_loss:
        loss = loss + options.z_loss * lse * lse
    # A factor, so that every derivative of an invalid row is NaN too.
    poison = torch.ones_like(loss).masked_fill(label.invalid, torch.nan)
    loss, s = torch.where(label.ignored, 0.0, loss * poison), torch.where(label.ignored, 0.0, s * poison)
    if not with_argmax:
        return Stats(loss, torch.where(label.ignored, 0.0, lse), s)
    key = torch.where(r == -torch.inf, -torch.inf, r * options.logit_scale)
    return Stats(loss, lse, s, key.argmax(-1).to(torch.int32))


def grad(
    inputs: Inputs, upstream: Upstream, spec: RowSpec, with_dtarget: bool, skip_zero: bool = True
) -> tuple[Tensor, Tensor | None]:
    """dlogits = slope·(a·p − b·q), and (with_dtarget) dtarget = b·(1−α)·w·(lse − x), each in its input's dtype.

    skip_zero: a row without upstream gradient has none, whatever it holds. It cuts the derivative by the upstream
    gradient at 0, so second derivatives go without it.
    """
    logits, target, weight = inputs
    lse, target_sum, dloss, dlse = upstream
    options = spec.options
    x, slope = _transform(logits.to(lse.dtype), options)
    label, spread = _targets(x, inputs, spec)
    b = torch.where(label.ignored, 0.0, dloss)
    a = b * (target_sum + 2.0 * options.z_loss * lse)
    if skip_zero:
        a = torch.where(b == 0, 0.0, a)
    if dlse is not None:
        a = a + dlse
    dlogits = a[:, None] * (x - lse[:, None]).exp_()
    # No gradient at masked classes, not even for their mass in q.
    mass = torch.where(label.x == -torch.inf, 0.0, b * label.mass)
    dlogits = dlogits.scatter_add_(-1, label.column[:, None], -mass[:, None])
    if spread is not None:
        dlogits = dlogits - torch.where(x == -torch.inf, 0.0, b[:, None] * spread)
    if slope is not None:
        dlogits = dlogits * slope
    if skip_zero:
        dlogits = dlogits.masked_fill_(((a == 0) & (b == 0))[:, None], 0.0)
    if not with_dtarget:
        return dlogits.to(logits.dtype), None
    coefficient = b[:, None] * (1.0 - options.label_smoothing)
    if weight is not None:
        coefficient = coefficient * weight.to(x.dtype)
    skip = (coefficient == 0) & (skip_zero | (x == -torch.inf))
    dtarget = coefficient * torch.where(skip, 0.0, lse[:, None] - x)
    return dlogits.to(logits.dtype), dtarget.to(target.dtype)


def without_dead_rows(inputs: Inputs, spec: RowSpec, dloss: Tensor, dlse: Tensor | None) -> Inputs:
    """Inputs with 0 in rows without upstream gradient whose loss or lse is not finite: 0·NaN is NaN."""
    logits, target, weight = inputs
    with torch.no_grad():
        out = stats(inputs, spec, with_argmax=True)
        hard = not target.is_floating_point()
        ignored = is_ignored(inputs, spec.options)
        dead = ((dloss == 0) | ignored) & ~(out.loss.isfinite() & out.lse.isfinite())
        if dlse is not None:
            dead = dead & (dlse == 0)
    safe = torch.where(dead & ~ignored, 0, target) if hard else torch.where(dead[:, None], 0.0, target)
    return Inputs(torch.where(dead[:, None], 0.0, logits), safe, weight)


def is_ignored(inputs: Inputs, options: Options) -> Tensor:
    """Whether each row is left out of the loss."""
    logits, target, _ = inputs
    if target.is_floating_point() or options.ignore_index is None:
        return torch.zeros(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    return target == options.ignore_index


def label_weights(inputs: Inputs, start: int, dtype: torch.dtype) -> Tensor:
    """The class weight of every row's label, 0 where it is none of the classes that weight has, from `start` on."""
    assert inputs.weight is not None
    column = inputs.target.long() - start
    inside = (column >= 0) & (column < len(inputs.weight))
    # By a vector: PyTorch reads a 0-d index on the host.
    safe = torch.where(inside, column, 0).reshape(-1)
    return torch.where(inside, inputs.weight.to(dtype)[safe].reshape(column.shape), 0.0)


def counted_weights(found: Tensor, inputs: Inputs, options: Options, n_classes: int) -> Tensor:
    """What each row adds to the divisor of `mean`, from its label's weight: 0 where it is ignored, 1 if invalid.

    An invalid label makes the mean NaN by its loss; counted as 1, it leaves the other rows' gradients finite.
    """
    valid = (inputs.target >= 0) & (inputs.target < n_classes)
    return torch.where(is_ignored(inputs, options), 0.0, torch.where(valid, found, 1.0))


class _Label(NamedTuple):
    """Of each row's hard label: its column, its x, its own mass in q; whether it is ignored, whether it is invalid."""

    column: Tensor
    x: Tensor
    mass: Tensor
    ignored: Tensor
    invalid: Tensor


def _targets(x: Tensor, inputs: Inputs, spec: RowSpec) -> tuple[_Label, Tensor | None]:
    """q in two parts: the labels' own mass, (1−α)·w_label, and what is spread: w·((1−α)·t + α/V), None for none."""
    n_classes = x.shape[-1]
    total, smoothing = spec.total_classes or n_classes, spec.options.label_smoothing
    keep, uniform = 1.0 - smoothing, smoothing / total
    w = None if inputs.weight is None else inputs.weight.to(x.dtype)
    ignored = is_ignored(inputs, spec.options)
    if inputs.target.is_floating_point():
        zero = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        spread = keep * inputs.target.to(x.dtype) + uniform
        return _Label(zero.long(), zero, zero, ignored, ignored), spread if w is None else spread * w
    index = inputs.target.long()
    column = index - (spec.vocab_start or 0)
    inside = (column >= 0) & (column < n_classes)
    column = torch.where(inside, column, 0)
    mass = keep * inside.to(x.dtype)
    label = _Label(
        column,
        x.gather(-1, column[:, None]).squeeze(-1),
        mass if w is None else mass * w[column],
        ignored,
        ~((index >= 0) & (index < total)) & ~ignored,
    )
    if not smoothing:
        return label, None
    spread = torch.full((1, n_classes), uniform, dtype=x.dtype, device=x.device)
    return label, spread if w is None else spread * w


def _transform(r: Tensor, options: Options) -> tuple[Tensor, Tensor | None]:
    """x = softcap·tanh(scale·r / softcap) and dx/dr (None: 1). A masked class (−inf) stays masked, with slope 0."""
    if options.logit_scale == 1.0 and options.softcap is None:
        return r, None
    masked = r == -torch.inf
    x = torch.where(masked, 0.0, r) * options.logit_scale
    slope = torch.full_like(x, options.logit_scale)
    if options.softcap is not None:
        y = x / options.softcap
        # sech² through exp of a non-positive number: 1 − tanh² would lose all digits where tanh saturates.
        e = (-2.0 * y.abs()).exp()
        slope = slope * (4.0 * e / (1.0 + e) ** 2)
        x = options.softcap * y.tanh()
    return torch.where(masked, -torch.inf, x), torch.where(masked, 0.0, slope)
