"""Writes committed results into the README and the pages, between their markers, and the newest into plots.

A part of the results that was not measured with the rest has an environment of its own.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.names import BYTES, ORDER, OURS_JAX, OURS_TORCH

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LINEAR = RESULTS / "linear" / "h200.json"
SPARSE_GRADIENT = RESULTS / "sparse_gradient.json"
COUNTERS = RESULTS / "counters.json"
README, LINEAR_PAGE, SPEED_PAGE = ROOT / "README.md", ROOT / "docs" / "linear.md", ROOT / "docs" / "speed.md"
# A generated part of a page: its marker's name and its text.
PART = re.compile(r"<!-- (?P<name>.*): begin -->\n(?P<text>.*?)<!-- (?P=name): end -->\n", re.DOTALL)


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


def moved(shape: dict, ms: float) -> float:
    """GB/s of bf16 logits read once and a gradient written once."""
    return 2 * 2 * shape["n_rows"] * shape["n_classes"] / ms / 1e6


def spread(timing: dict) -> float:
    """The quartiles' distance as a fraction of the median."""
    return (timing["high_ms"] - timing["low_ms"]) / timing["ms"]


def bandwidth(results: dict) -> str:
    """What the table's GB/s count, what a copy reaches, and how far repetitions lie apart."""
    large = [shape for shape in results["shapes"] if shape["n_rows"] >= 2048]
    copies = [moved(shape, shape["copy_ms"]) for shape in large]
    spreads = [max(spread(shape[name]["train"]) for shape in large) for name in (OURS_TORCH, OURS_JAX)]
    small = [
        f"{ratio(shape, OURS_TORCH, 'kernels')} at {shape['n_rows']}×{shape['n_classes']}"
        for shape in results["shapes"]
        if shape["n_rows"] < 2048
    ]
    return (
        f"GB/s: of ce-kernels torch, the logits read once and the gradient written once; copies from 2048 rows on move "
        f"{min(copies):.0f} to {max(copies):.0f}. Times are medians; the quartiles of a training step of ours lie at "
        f"most {max(spreads):.1%} apart there. By its kernels alone, as JAX is timed, ce-kernels torch takes "
        f"{' and '.join(small)}."
    )


def training_table(results: dict) -> list[str]:
    """Training step by shape and contender; bandwidth, `none` and forward of ours."""
    shapes = results["shapes"]
    names = [name for name in ORDER if any(name in shape for shape in shapes)]
    lines = [
        [
            f"{shape['name']} {shape['n_rows']}×{shape['n_classes']}",
            *(ratio(shape, name) for name in names),
            f"{moved(shape, shape[OURS_TORCH]['train']['ms']):.0f}",
            ratio(shape, OURS_TORCH, "none"),
            of_ceiling(shape, OURS_TORCH),
            of_ceiling(shape, OURS_JAX),
        ]
        for shape in shapes
    ]
    return rows(["N×V", *names, "GB/s", "`none`", "forward, torch", "forward, JAX"], lines)


def options_table(results: dict) -> list[str]:
    """Each option's training step against the plain one, and against what only moves the same bytes."""
    times = {name: timing["ms"] for name, timing in results["options"]["times"].items()}
    names = [name for name in times if name not in ("copy", *BYTES.values())]
    return rows(
        ["× the time of", *names],
        [
            ["the plain step", *(f"{times[name] / times['plain']:.2f}" for name in names)],
            ["moving the same bytes", *(f"{times[name] / times[BYTES.get(name, 'copy')]:.2f}" for name in names)],
        ],
    )


def dtypes_table(results: dict) -> list[str]:
    """Our training step by dtype, and the forward pass as the fraction of the read ceiling that it reaches."""
    points = results["growth"]["dtypes"]
    lines = [["training step", *(f"{point['train_ms'] / point['copy_ms']:.2f}" for point in points)]]
    if all("forward_ms" in point for point in points):
        lines.append(["forward", *(f"{point['read_ms'] / point['forward_ms']:.0%}" for point in points)])
    return rows(["4096×128256", *(point["dtype"] for point in points)], lines)


def few_classes_table(results: dict) -> list[str]:
    """Training step, and in brackets the forward pass, where classes are few or in front of other dimensions."""
    names = [name for name in ORDER if any(name in shape for shape in results["few_classes"])]
    lines = [
        [
            f"{shape['name']} {'×'.join(str(size) for size in shape['size'])}",
            *(f"{ratio(shape, name)} ({ratio(shape, name, 'forward')})" for name in names),
        ]
        for shape in results["few_classes"]
    ]
    return rows(["(N, C, d1, …)", *names], lines)


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


def compiling_table(results: dict) -> list[str]:
    """How many graphs and kernels a training step compiles, by what is new in it."""
    found = results["compiling"]
    eager, compiled = found["eager"], found["torch.compile"]

    def line(title: str, way: dict, count: Callable[[dict], int]) -> list[str]:
        others = sum(count(step) for step in way["batch_sizes"].values())
        options = (count(step) for step in way["options"].values())
        return [title, *(str(n) for n in (count(way["first_call"]), others, *options))]

    return rows(
        ["compiled", f"{found['first_rows']} rows", f"then {', '.join(eager['batch_sizes'])} rows", *eager["options"]],
        [
            line("kernels, eager", eager, lambda step: len(step["kernels"])),
            line("graphs, `torch.compile`", compiled, lambda step: step["graphs"]),
            line("kernels, `torch.compile`", compiled, lambda step: len(step["kernels"])),
        ],
    )


def first_call(found: dict) -> str:
    """Seconds of the first call that the compiling table is about, compilation included."""
    eager, compiled = (found[way]["first_call"]["seconds"] for way in ("eager", "torch.compile"))
    apart = f" This table: {measured_on(found)}" if "environment" in found else ""
    return f"Seconds of its first call with empty caches: {eager:.1f}, under `torch.compile` {compiled:.1f}.{apart}"


def first_calls(results: dict) -> str:
    """Seconds of the longest first calls."""
    shapes = results["shapes"]
    in_torch, in_jax = (max(shape[name]["first_call_s"] for shape in shapes) for name in (OURS_TORCH, OURS_JAX))
    return f"Seconds of the longest first call at any shape: {in_torch:.1f} in PyTorch, {in_jax:.1f} in JAX."


def section(results: dict) -> str:
    """All that stands between the markers."""
    few, compiling = [], []
    if "few_classes" in results:
        few = [
            "Few classes, and classes in front of other dimensions, read in place: training step, and in brackets the",
            "forward pass, as multiples of copying the logits once:",
            "",
            *few_classes_table(results),
            "",
        ]
    if "compiling" in results:
        part = results["compiling"]
        compiling = [
            f"What a PyTorch training step of {part['n_classes']} classes compiles at first, at other",
            "batch sizes, and at another value of an option (`fullgraph=True`):",
            "",
            *compiling_table(results),
            "",
            first_call(part),
            "",
        ]
    lines = [
        *training_table(results),
        "",
        bandwidth(results),
        "",
        "Options at 4096×128256; of the bytes, a row that is ignored is written and not read:",
        "",
        *options_table(results),
        "",
        "Dtypes, as multiples of copying the logits once (float16 takes two launches, so that loss scaling works):",
        "",
        *dtypes_table(results),
        "",
        *few,
        "Peak memory of a training step at 4096×128256 beyond the logits (JAX: temporary memory, logits donated), as",
        "multiples of the logits:",
        "",
        *memory_table(results),
        "",
        "Temporary memory of a jitted Flax training step (head, loss, both gradients, SGD) at 4096×128256:",
        "",
        *flax_table(results),
        "",
        *compiling,
        first_calls(results),
        "",
        "Host time of an eager PyTorch call in microseconds (in brackets its launches alone by Triton, which searches",
        "every time for what it compiled, as the call does the first time only):",
        "",
        *host_table(results),
        "",
        "![Training step against vocabulary and rows](docs/speed.svg)",
        "",
        measured_on(results),
    ]
    return "\n".join(lines)


def linear_section(results: dict) -> str:
    """The whole head by contender."""
    names = list(dict.fromkeys(name for head in results["heads"] for name in head["contenders"]))
    lines = []
    for head in results["heads"]:
        found = [head["contenders"].get(name) for name in names]
        cells = ["–" if one is None else f"{one['ratio']:.2f}, {one['memory_gib']:.2f} GiB" for one in found]
        lines.append([f"{head['name']} {head['n_rows']} · {head['width']} · {head['n_classes']}", *cells])
    others = [head for head in results["heads"] if "environment" in head]
    return "\n".join([
        "Loss and gradients as a multiple of the three matmuls alone, and memory beyond inputs and gradients:",
        "",
        *rows(["N · D · V", *names], lines),
        "",
        measured_on(results),
        *(f"{head['name']}: {measured_on(head)}" for head in others),
    ])  # fmt: skip


def sparse_gradient_section(results: dict) -> str:
    """What skipping blocks of small gradients saves and costs, by the order of the classes and the threshold."""
    by_order: dict[str, list[dict]] = {}
    for row in results["rows"]:
        by_order.setdefault(row["order"], []).append(row)
    lines = []
    for order, (dense, *found) in by_order.items():
        floor = dense["dhidden_ms"] + dense["dweight_ms"]
        cells = [
            f"{row['kept']:.0%}, {(row['blocks_ms'] + row['dhidden_ms'] + row['dweight_ms']) / floor:.2f}, "
            f"{max(row['dhidden_error'], row['dweight_error']):.0e}"
            for row in (dense, *found)
        ]
        lines.append([order, *cells])
    thresholds = [row["threshold"] for row in next(iter(by_order.values()))]
    n_rows, width, n_classes = results["shape"]
    return "\n".join([
        "## Skipping small gradients",
        "",
        "Blocks of the gradient of logits whose every |p − q| is below a threshold could be left out of the two",
        f"gradient matmuls. On a head of {n_rows} · {width} · {n_classes} as peaked as a trained one (entropy",
        f"{results['entropy']:g} nats): blocks kept; time of finding them and of both matmuls, as a multiple of",
        "cuBLAS' over all blocks; and the larger relative error of the two gradients, by order of classes and",
        "threshold:",
        "",
        *rows(["classes by", *(one if isinstance(one, str) else f"{one:.1g}" for one in thresholds)], lines),
        "",
        measured_on(results),
    ])  # fmt: skip


def longest_waits(kernel: dict) -> str:
    """What a resident warp waits for most, as shares of its time; the profiler's names."""
    waits = {reason: warps for reason, warps in kernel["warps"].items() if reason not in ("selected", "not_selected")}
    total = sum(kernel["warps"].values())
    first_two = sorted(waits, key=lambda reason: -waits[reason])[:2]
    return ", ".join(f"`{reason}` {waits[reason] / total:.0%}" for reason in first_two)


# What a kernel keeps busy, by the name in the results, as the table calls it.
BUSY = {
    "dram_busy": "DRAM busy",
    "l2_busy": "L2 busy",
    "l2_hits": "L2 hits",
    "exponential_unit_busy": "exponential unit",
    "issue_slots_busy": "issue slots",
    "warps_resident": "warps resident",
}


def counters_section(results: dict) -> str:
    """What each kernel moves, what it keeps busy and what it waits for."""
    lines = []
    for kernel in results["kernels"]:
        logits = 2 * kernel["n_rows"] * kernel["n_classes"]
        lines.append([
            f"{kernel['case']}, {kernel['n_rows']}×{kernel['n_classes']}",
            kernel["kernel"].removeprefix("cross_entropy_").removesuffix("_kernel"),
            f"{kernel['ns'] / 1e6:.3f}",
            f"{kernel['dram_read'] / logits:.2f} + {kernel['dram_written'] / logits:.2f}",
            *(f"{kernel[name]:.0f}%" for name in BUSY),
            longest_waits(kernel),
        ])  # fmt: skip
    return "\n".join([
        *rows(["case", "kernel", "ms", "DRAM read + written, × logits", *BUSY.values(), "longest waits"], lines),
        "",
        measured_on(results),
    ])  # fmt: skip


def measured_on(results: dict) -> str:
    """GPU, date, commit and versions in a sentence."""
    about = results["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return f"{about['gpu']}, driver {about['driver']}, {about['date']}, commit {about['commit']}; {versions}."


def updated(page: Path) -> str:
    """A page with its generated parts as the results have them; empty where there are no results yet."""
    sources: dict[str, tuple[Path, Callable[[dict], str]]] = {
        "benchmarks": (newest(), section),
        "linear": (LINEAR, linear_section),
        "sparse gradient": (SPARSE_GRADIENT, sparse_gradient_section),
        "counters": (COUNTERS, counters_section),
    }

    def part(found: re.Match) -> str:
        name = found["name"]
        path, write = sources[name]
        text = write(json.loads(path.read_text())) + "\n" if path.exists() else ""
        return f"<!-- {name}: begin -->\n{text}<!-- {name}: end -->\n"

    return PART.sub(part, page.read_text())


def report() -> None:
    """Rewrites the generated parts of the README and of the pages, and the plots."""
    from benchmarks.plots import draw

    for page in (README, LINEAR_PAGE, SPEED_PAGE):
        page.write_text(updated(page))
    draw(read(), ROOT / "docs" / "speed.svg")
