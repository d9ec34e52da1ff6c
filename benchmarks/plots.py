"""Plots of the results: training step against vocabulary by contender, what of the limit ours reach, how they grow."""

import hashlib
import json
from pathlib import Path

from benchmarks.names import ORDER, OURS_JAX, OURS_TORCH


def digest(results: dict) -> str:
    """What a plot carries to tell which results it shows."""
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()[:16]


def draw(results: dict, path: Path) -> None:
    """One picture of five panels; the same results give the same bytes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "ce-kernels"
    import matplotlib.pyplot as plt

    figure, ((peers, limit, dtypes), (rows, vocabularies, nothing)) = plt.subplots(
        2, 3, figsize=(15, 9), layout="constrained"
    )
    nothing.axis("off")
    shapes = sorted(
        (shape for shape in results["shapes"] if shape["n_rows"] >= 2048), key=lambda shape: shape["n_classes"]
    )
    for name in ORDER:
        points = [
            (shape["n_classes"], shape[name]["train"]["ms"] / shape["copy_ms"]) for shape in shapes if name in shape
        ]
        if points:
            width = 2.5 if name.startswith("ce-kernels") else 1.0
            peers.plot(*zip(*points, strict=True), marker="o", linewidth=width, label=name)
    peers.set(xscale="log", xlabel="classes", title="Training step by vocabulary")
    peers.legend(fontsize="small")
    for name in (OURS_TORCH, OURS_JAX):
        for kind, floor in (("train", "copy_ms"), ("forward", "read_ms")):
            points = [(shape["n_classes"], shape[floor] / shape[name][kind]["ms"]) for shape in shapes if name in shape]
            limit.plot(*zip(*points, strict=True), marker="o", label=f"{name}, {kind}")
    limit.set(xscale="log", xlabel="classes", title="Fraction of the limit", ylabel="copying, reading / ours")
    limit.set_ylim(0.0, 1.05)
    limit.axhline(1.0, color="gray", linestyle=":")
    limit.legend(fontsize="small")
    points = [(point["dtype"], point["train_ms"] / point["copy_ms"]) for point in results["growth"]["dtypes"]]
    dtypes.bar(*zip(*points, strict=True), width=0.5)
    dtypes.set(title="ce-kernels: dtypes at 4096×128256")
    for panel, kind, axis in ((rows, "rows", "n_rows"), (vocabularies, "vocabularies", "n_classes")):
        points = [(point[axis], point["train_ms"] / point["copy_ms"]) for point in results["growth"][kind]]
        panel.plot(*zip(*points, strict=True), marker="o")
        panel.set(xscale="log", xlabel=kind)
    rows.set(title="ce-kernels: rows of 128256 classes", xlabel="rows")
    vocabularies.set(title="ce-kernels: classes at 2²⁸ logits", xlabel="classes")
    for panel, top in ((peers, 8.0), (dtypes, None), (rows, None), (vocabularies, None)):
        panel.set(ylabel="multiples of copying the logits")
        panel.set_ylim(0.0, top)
        panel.axhline(1.0, color="gray", linestyle=":")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Description": digest(results)})
    plt.close(figure)
