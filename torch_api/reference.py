"""The contract in plain PyTorch operations: the implementation on CPUs, and the rule of second derivatives.

`stats` and `grad` mirror the kernels: rows [N, V], row vectors [N], the formula of `ce_kernels.spec`. Both are
differentiable by autograd. Hard labels are soft targets t = onehot(label).
"""

import torch
from torch import Tensor

from ce_kernels import Options


def compute_dtype(logits: Tensor) -> torch.dtype:
    """fp64 for fp64 logits, fp32 for every other dtype."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def stats(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: Options, with_argmax: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """loss, lse, s = Σq and (with_argmax) argmax per row; lse of ignored rows is 0 unless with_argmax."""
    r = logits.to(compute_dtype(logits))
    x, _ = _transform(r, options)
    t, ignored, invalid = _targets(target, x, options)
    if not with_argmax:
        x = torch.where(ignored[:, None], 0.0, x)
    q = _mass(t, weight, options)
    m = x.detach().amax(-1, keepdim=True)
    m = torch.where(m == -torch.inf, 0.0, m)
    log_d = (x - m).exp().sum(-1).log()
    # Against the row's maximum, so that a confident row keeps its small loss; no 0·∞ at masked classes.
    distance = m - torch.where((x == -torch.inf) & (q == 0), m, x)
    s = q.sum(-1)
    loss = (q * distance).sum(-1) + torch.where(s != 0, s * log_d, 0.0)
    lse = m.squeeze(-1) + log_d
    if options.z_loss:
        loss = loss + options.z_loss * lse * lse
    # A factor, so that every derivative of an invalid row is NaN too.
    poison = torch.where(invalid, torch.nan, 1.0)
    loss, s = torch.where(ignored, 0.0, loss * poison), torch.where(ignored, 0.0, s * poison)
    if not with_argmax:
        return loss, torch.where(ignored, 0.0, lse), s, None
    key = r * options.logit_scale
    return loss, lse, s, torch.where(r == -torch.inf, -torch.inf, key).argmax(-1).to(torch.int32)


def grad(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    target_sum: Tensor,
    dloss: Tensor,
    dlse: Tensor | None,
    options: Options,
    with_dtarget: bool,
) -> tuple[Tensor, Tensor | None]:
    """dlogits = slope·(a·p − b·q), and (with_dtarget) dtarget = b·(1−α)·w·(lse − x), each in its input's dtype."""
    r = logits.to(lse.dtype)
    x, slope = _transform(r, options)
    t, ignored, _ = _targets(target, x, options)
    b = torch.where(ignored, 0.0, dloss)
    a = torch.where(b == 0, 0.0, b * (target_sum + 2.0 * options.z_loss * lse))
    if dlse is not None:
        a = a + dlse
    # A row without upstream gradient has none, whatever it holds.
    skip = (a == 0) & (b == 0)
    x = torch.where(skip[:, None], 0.0, x)
    safe_lse = torch.where(skip, 0.0, lse)[:, None]
    q = torch.where(x == -torch.inf, 0.0, _mass(t, weight, options))
    dlogits = a[:, None] * (x - safe_lse).exp() - b[:, None] * q
    if slope is not None:
        dlogits = dlogits * torch.where(skip[:, None], 0.0, slope)
    if not with_dtarget:
        return dlogits.to(logits.dtype), None
    coefficient = b[:, None] * (1.0 - options.label_smoothing)
    if weight is not None:
        coefficient = coefficient * weight.to(x.dtype)
    dtarget = coefficient * torch.where(coefficient == 0, 0.0, safe_lse - x)
    return dlogits.to(logits.dtype), dtarget.to(target.dtype)


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


def _targets(target: Tensor, x: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """The target distribution t [N, V] and per row whether its label is ignored, and whether it is invalid."""
    if target.is_floating_point():
        no = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        return target.to(x.dtype), no, no
    label = target.long()
    valid = (label >= 0) & (label < x.shape[-1])
    ignored = label == options.ignore_index if options.ignore_index is not None else torch.zeros_like(valid)
    index = torch.where(valid, label, 0)[:, None]
    return torch.zeros_like(x).scatter(-1, index, valid[:, None].to(x.dtype)), ignored, ~valid & ~ignored


def _mass(t: Tensor, weight: Tensor | None, options: Options) -> Tensor:
    """q = w·((1−α)·t + α/V)."""
    q = t
    if options.label_smoothing:
        q = (1.0 - options.label_smoothing) * q + options.label_smoothing / t.shape[-1]
    return q if weight is None else q * weight.to(t.dtype)
