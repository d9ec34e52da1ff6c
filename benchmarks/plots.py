"""Plots of the results: training step against vocabulary by contender, and how ours grows."""

import hashlib
import json
from pathlib import Path

from benchmarks.names import ORDER


def digest(results: dict) -> str:
    """What a plot carries to tell which results it shows."""
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()[:16]


def draw(results: dict, path: Path) -> None:
    """One picture of three panels; the same results give the same bytes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "ce-kernels"
    import matplotlib.pyplot as plt

    figure, (peers, rows, vocabularies) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
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
    for panel, kind, axis in ((rows, "rows", "n_rows"), (vocabularies, "vocabularies", "n_classes")):
        points = [(point[axis], point["train_ms"] / point["copy_ms"]) for point in results["growth"][kind]]
        panel.plot(*zip(*points, strict=True), marker="o")
        panel.set(xscale="log", xlabel=kind)
    rows.set(title="ce-kernels: rows of 128256 classes", xlabel="rows")
    vocabularies.set(title="ce-kernels: classes at 2²⁸ logits", xlabel="classes")
    for panel, top in ((peers, 8.0), (rows, None), (vocabularies, None)):
        panel.set(ylabel="multiples of copying the logits")
        panel.set_ylim(0.0, top)
        panel.axhline(1.0, color="gray", linestyle=":")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Description": digest(results)})
    plt.close(figure)
