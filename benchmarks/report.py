"""Writes the committed results into the README, between its markers."""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "h200.json"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
CONTENDERS = ("ce-kernels torch", "ce-kernels JAX", "torch", "torch.compile", "Liger", "Optax")


def table(results: dict) -> str:
    """Training step as a multiple of copying the logits once; forward as a fraction of the read ceiling."""
    names = [name for name in CONTENDERS if all(name in shape for shape in results["shapes"])]
    lines = [
        "| N×V | " + " | ".join(names) + " | forward, torch | forward, JAX |",
        "|---" * (len(names) + 3) + "|",
    ]
    for shape in results["shapes"]:
        cells = [f"{shape['name']} {shape['n_rows']}×{shape['n_classes']}"]
        cells += [f"{shape[name]['train_ms'] / shape['copy_ms']:.2f}" for name in names]
        for name in ("ce-kernels torch", "ce-kernels JAX"):
            cells.append(f"{shape['read_ms'] / shape[name]['forward_ms']:.0%}")
        lines.append("| " + " | ".join(cells) + " |")
    about = results["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines += ["", f"{about['gpu']}, {about['date']}, commit {about['commit']}; {versions}."]
    return "\n".join(lines)


def updated_readme() -> str:
    """The README with the table of the committed results."""
    text = (ROOT / "README.md").read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table(json.loads(RESULTS.read_text()))}\n{END}{after}"


def report() -> None:
    """Rewrites the README's table."""
    (ROOT / "README.md").write_text(updated_readme())
