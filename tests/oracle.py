"""Float64 reference for softmax cross-entropy, one row at a time; r is a row of raw logits [V].

x = scale·r, then with a soft cap c: x = c·tanh(x/c);  a raw −inf (a masked class) stays −inf
m = (1−α)·t + α/V with t = onehot(y) for a hard label;  q = w·m;  s = Σ q
lse = log Σ exp(x);  p = exp(x − lse)
loss = s·lse − Σ q·x + λ·lse²
"""

from dataclasses import dataclass

import numpy as np

_quiet = np.errstate(all="ignore")


@dataclass(frozen=True)
class Options:
    """weight: [V] or None (all 1); label_smoothing: α; z_loss: λ; softcap: c; logit_scale: scale."""

    weight: np.ndarray | None = None
    ignore_index: int | None = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0


@dataclass
class Rows:
    """Each [N]. An ignored row has loss 0 and target_sum 0; lse and predicted depend on its logits alone."""

    loss: np.ndarray
    lse: np.ndarray
    target_sum: np.ndarray
    predicted: np.ndarray


@dataclass
class Gradients:
    """dlogits, dlogits_bound: [N, V]; dtarget: [N, V] or None (hard); dweight: [V] or None (no weights)."""

    dlogits: np.ndarray
    dtarget: np.ndarray | None
    dweight: np.ndarray | None
    dlogits_bound: np.ndarray


def _is_hard(target):
    """Whether target is [N] labels rather than [N, V] probabilities."""
    return np.ndim(target) == 1


def _ignored(target, options):
    """[N] bool; rows with soft targets are never ignored."""
    if not _is_hard(target) or options.ignore_index is None:
        return np.zeros(len(target), dtype=bool)
    return np.asarray(target) == options.ignore_index


def _weight(options, n_classes):
    """[V]: w."""
    return np.ones(n_classes) if options.weight is None else np.asarray(options.weight, dtype=np.float64)


def _scale_and_cap(r, options):
    """(scale·r, x, dx/dr), each [V]."""
    masked = r == -np.inf
    scaled = np.where(masked, -np.inf, options.logit_scale * np.where(masked, 0.0, r))  # 0·(−inf) is NaN
    if options.softcap is None:
        return scaled, scaled, np.full(len(r), float(options.logit_scale))
    x = np.where(masked, -np.inf, options.softcap * np.tanh(scaled / options.softcap))
    # 1/cosh² rather than 1 − tanh², which cancels where the cap saturates.
    return scaled, x, options.logit_scale / np.cosh(scaled / options.softcap) ** 2


def _lse(x):
    """log Σ exp(x): −inf if every x is −inf, NaN if any x is NaN or +inf."""
    top = np.max(x)
    return top if top == -np.inf else top + np.log(np.sum(np.exp(x - top)))


def _measure(t, options, n_classes):
    """m = (1−α)·t + α/V: [V]; t is a label or a row [V]; all NaN for a label out of range."""
    if np.ndim(t) == 0:
        if not 0 <= int(t) < n_classes:
            return np.full(n_classes, np.nan)
        t = np.arange(n_classes) == int(t)
    alpha = options.label_smoothing
    return (1 - alpha) * np.asarray(t, dtype=np.float64) + alpha / n_classes


def _times(coefficient, value):
    """coefficient·value, 0 where the coefficient is 0 even if the value is infinite or NaN."""
    return np.where(coefficient == 0, 0.0, coefficient * value)


@_quiet
def rows(logits, target, options):
    """loss, lse, s, argmax(scale·r) (lowest index on ties, the first NaN if any): [N] each; logits [N, V]."""
    logits = np.asarray(logits, dtype=np.float64)
    n_rows, n_classes = logits.shape
    loss, lse, target_sum = np.zeros((3, n_rows))
    predicted = np.zeros(n_rows, dtype=np.int64)
    ignored, w = _ignored(target, options), _weight(options, n_classes)
    for i in range(n_rows):
        scaled, x, _ = _scale_and_cap(logits[i], options)
        lse[i], predicted[i] = _lse(x), np.argmax(scaled)
        if ignored[i]:
            continue
        q = w * _measure(target[i], options, n_classes)
        target_sum[i] = np.sum(q)
        loss[i] = target_sum[i] * lse[i] - np.sum(_times(q, x)) + options.z_loss * lse[i] ** 2
    return Rows(loss, lse, target_sum, predicted)


@_quiet
def gradients(logits, target, options, dloss, dlse, *, unit_roundoff_out, unit_roundoff, c):
    """Gradients of Σ_i dloss_i·loss_i + dlse_i·lse_i; dloss [N], dlse [N] or None (0).

    a = dloss·(s + 2λ·lse) + dlse
    dlogits = dx/dr·(a·p − dloss·q)
    dtarget = dloss·(1−α)·w·(lse − x)
    dweight = Σ_i dloss_i·m_i·(lse_i − x_i)
    bound   = c·u·|dx/dr|·((|dloss|·|s + 2λ·lse| + |dlse|)·p + |dloss|·|q|) + u_out·|dlogits|
    """
    logits = np.asarray(logits, dtype=np.float64)
    n_rows, n_classes = logits.shape
    dlogits, bound, dtarget, dweight = *np.zeros((3, n_rows, n_classes)), np.zeros(n_classes)
    ignored, w = _ignored(target, options), _weight(options, n_classes)
    for i in range(n_rows):
        b = 0.0 if ignored[i] else float(dloss[i])
        d = 0.0 if dlse is None else float(dlse[i])
        if b == 0 and d == 0:
            continue
        _, x, slope = _scale_and_cap(logits[i], options)
        lse = _lse(x)
        p = np.exp(x - lse)
        m = np.zeros(n_classes) if b == 0 else _measure(target[i], options, n_classes)
        q = w * m
        dloss_dlse = np.sum(q) + 2 * options.z_loss * lse
        dlogits[i] = slope * ((b * dloss_dlse + d) * p - b * q)
        terms = (abs(b) * abs(dloss_dlse) + abs(d)) * p + abs(b) * np.abs(q)
        bound[i] = c * unit_roundoff * np.abs(slope) * terms + unit_roundoff_out * np.abs(dlogits[i])
        # A masked class gets 0 even when it is the label, but not in a row that is NaN as a whole.
        if np.isfinite(dloss_dlse + lse):
            dlogits[i, logits[i] == -np.inf] = bound[i, logits[i] == -np.inf] = 0.0
        dtarget[i] = _times(b * (1 - options.label_smoothing) * w, lse - x)
        dweight += _times(b * m, lse - x)
    dtarget, dweight = None if _is_hard(target) else dtarget, None if options.weight is None else dweight
    return Gradients(dlogits, dtarget, dweight, bound)


def _divisor(target, options, denominator, n_rows):
    """denominator if given; hard labels: Σ w_y over rows not ignored; soft targets: number of rows."""
    if denominator is not None:
        return np.float64(denominator)
    if not _is_hard(target):
        return np.float64(n_rows)
    labels = [int(y) for y in np.asarray(target)[~_ignored(target, options)]]
    if options.weight is None:
        return np.float64(len(labels))
    # A label out of range has no weight; it counts 1, as without weights, so that only its row becomes NaN.
    w = _weight(options, None)
    return np.float64(sum(w[y] if 0 <= y < len(w) else 1.0 for y in labels))


@_quiet
def reduce(rows, target, options, reduction, denominator=None):
    """none: loss [N]; sum: Σ loss; mean: Σ loss / divisor, NaN for 0/0. The loss of ignored rows is 0."""
    if reduction == "none":
        return rows.loss
    if reduction == "sum":
        return float(np.sum(rows.loss))
    if reduction == "mean":
        return float(np.sum(rows.loss) / _divisor(target, options, denominator, len(rows.loss)))
    raise ValueError(f"unknown reduction {reduction!r}")


@_quiet
def upstream(target, options, reduction, denominator=None, n_rows=None):
    """d(reduced)/d(loss_i): [N]; 1 for sum, 1/divisor for mean, 0 in ignored rows.

    n_rows: the number of rows soft targets are averaged over, len(target) when absent.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"no single upstream gradient for reduction {reduction!r}")
    each = np.float64(1.0)
    if reduction == "mean":
        each = each / _divisor(target, options, denominator, len(target) if n_rows is None else n_rows)
    return np.where(_ignored(target, options), 0.0, each)


@_quiet
def mean_dweight(logits, target, options, dmean=1.0):
    """dmean·d(S/W)/dw: [V], for hard labels, with S = Σ loss and W = Σ w_y over rows not ignored.

    d(S/W)/dw_k = (dS/dw_k) / W − (S/W²)·#{i not ignored: y_i = k}
    """
    if not _is_hard(target) or options.weight is None:
        raise ValueError("the divisor of mean depends on weights only with hard labels and weights")
    dloss = dmean * upstream(target, options, "mean")
    zero_bound = {"unit_roundoff_out": 0.0, "unit_roundoff": 0.0, "c": 0.0}
    direct = gradients(logits, target, options, dloss, None, **zero_bound).dweight
    mean = reduce(rows(logits, target, options), target, options, "mean")
    labels = np.asarray(target)[~_ignored(target, options)]
    count = np.array([np.sum(labels == k) for k in range(len(options.weight))])
    return direct - _times(count, dmean * mean / _divisor(target, options, None, None))
