"""Writes the newest committed results into the README, between its markers, and into its plots."""

import json
from pathlib import Path

from benchmarks.names import ORDER, OURS_JAX, OURS_TORCH

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def newest() -> Path:
    """The results with the latest date in their name."""
    return max(RESULTS.glob("*-????-??-??.json"), key=lambda path: path.stem[-len("2026-01-01") :])


def read() -> dict:
    """The newest results."""
    return json.loads(newest().read_text())


def ratio(shape: dict, name: str, kind: str = "train") -> str:
    """A contender's time as a multiple of copying the logits once; a dash where it was not timed."""
    if kind not in shape.get(name, {}):
        return "–"
    return f"{shape[name][kind]['ms'] / shape['copy_ms']:.2f}"


def of_ceiling(shape: dict, name: str) -> str:
    """A forward pass as the fraction of the read ceiling that it reaches."""
    return f"{shape['read_ms'] / shape[name]['forward']['ms']:.0%}"


def rows(header: list[str], lines: list[list[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines)]


def training_table(results: dict) -> list[str]:
    """Training step by shape and contender; `none` and forward of ours."""
    shapes = results["shapes"]
    names = [name for name in ORDER if any(name in shape for shape in shapes)]
    lines = [
        [
            f"{shape['name']} {shape['n_rows']}×{shape['n_classes']}",
            *(ratio(shape, name) for name in names),
            ratio(shape, OURS_TORCH, "none"),
            of_ceiling(shape, OURS_TORCH),
            of_ceiling(shape, OURS_JAX),
        ]
        for shape in shapes
    ]
    return rows(["N×V", *names, "`none`", "forward, torch", "forward, JAX"], lines)


def options_table(results: dict) -> list[str]:
    """Each option's training step against the plain one."""
    times = results["options"]["times"]
    plain, floor = times["plain"]["ms"], times["read two, write one"]["ms"]
    names = [name for name in times if name not in ("plain", "copy", "read two, write one", "soft targets")]
    cells = [f"{times[name]['ms'] / plain:.2f}" for name in names]
    return rows(
        [*names, "soft targets, to reading both and writing one"],
        [[*cells, f"{times['soft targets']['ms'] / floor:.2f}"]],
    )


def memory_table(results: dict) -> list[str]:
    """Peak memory of a training step beyond the logits, in multiples of the logits."""
    shape = next(shape for shape in results["shapes"] if shape["name"] == "Llama 3")
    size = 2 * shape["n_rows"] * shape["n_classes"]
    found = {
        name + suffix: shape[name][kind]
        for name in ORDER
        for kind, suffix in (("peak_bytes", ""), ("donated_peak_bytes", ", donated"), ("temporary_bytes", ""))
        if kind in shape.get(name, {})
    }
    return rows(list(found), [[f"{held / size:.2f}" for held in found.values()]])


def flax_table(results: dict) -> list[str]:
    """Temporary memory of a jitted Flax step by loss, in GiB."""
    held = results["flax_step_bytes"]
    return rows(list(held), [[f"{size / 2**30:.2f} GiB" for size in held.values()]])


def host_table(results: dict) -> list[str]:
    """Host microseconds of an eager PyTorch call, and what of it the bare launches take."""
    host = results["host"]
    names = [name for name in host if not name.endswith(": bare")]
    cells = [f"{host[name]:.0f}" + (f" ({host[bare]:.0f})" if host[bare := f"{name}: bare"] else "") for name in names]
    return rows(names, [cells])


def section(results: dict) -> str:
    """All that stands between the markers."""
    about = results["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [
        *training_table(results),
        "",
        "Options, as multiples of the plain training step at 4096×128256:",
        "",
        *options_table(results),
        "",
        "Peak memory of a training step at 4096×128256 beyond the logits (JAX: temporary memory, logits donated), as",
        "multiples of the logits:",
        "",
        *memory_table(results),
        "",
        "Temporary memory of a jitted Flax training step (head, loss, both gradients, SGD) at 4096×128256:",
        "",
        *flax_table(results),
        "",
        "Host time of an eager PyTorch call in microseconds (of it, the bare launches):",
        "",
        *host_table(results),
        "",
        "![Training step against vocabulary and rows](docs/speed.svg)",
        "",
        f"{about['gpu']}, driver {about['driver']}, {about['date']}, commit {about['commit']}; {versions}.",
    ]
    return "\n".join(lines)


def updated_readme() -> str:
    """The README with the newest results."""
    text = (ROOT / "README.md").read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{section(read())}\n{END}{after}"


def report() -> None:
    """Rewrites the README's tables and plots."""
    from benchmarks.plots import draw

    (ROOT / "README.md").write_text(updated_readme())
    draw(read(), ROOT / "docs" / "speed.svg")
