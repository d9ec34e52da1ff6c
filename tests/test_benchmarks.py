"""The benchmarks refuse wrong results, and pages claim no figure that the committed results do not hold."""

import copy
import csv
import io
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import triton

import torch_api
from benchmarks import compiling, counters, plots, report, run, timing, tune
from benchmarks.names import OURS_TORCH
from benchmarks.timing import mistake
from ce_kernels.tuning import Config

ROOT = Path(__file__).parent.parent
README = report.README.read_text()
PARTS = {
    report.README: ["linear", "benchmarks"],
    report.LINEAR_PAGE: ["sparse gradient"],
    report.SPEED_PAGE: ["counters"],
}
ABOUT = {"gpu": "a GPU", "driver": "1", "date": "2026-01-01", "commit": "abc", "versions": {"torch": "2.12"}}
FIGURE = re.compile(r"\d(\.\d+)?\s?(×|%|ms\b|µs|us\b|GB|GiB|TB|times faster|x faster)")


def outside_of_results(text: str) -> str:
    """The prose: without the generated parts and without code."""
    return re.sub(r"```.*?```|`[^`]*`", "", report.PART.sub("", text), flags=re.DOTALL)


@pytest.mark.parametrize("page", PARTS, ids=lambda page: page.name)
def test_generated_parts_are_those_of_the_results(page):
    assert [found["name"] for found in report.PART.finditer(page.read_text())] == PARTS[page]
    assert report.updated(page) == page.read_text(), "run: python -m benchmarks report"


def linear_results() -> dict:
    head = {"name": "Llama 3 8B", "n_rows": 8192, "width": 4096, "n_classes": 128256}
    found = {"ms": 2.1, "floor_ms": 2.0, "ratio": 1.05, "memory_gib": 0.312}
    return {
        "environment": ABOUT,
        "heads": [
            head | {"contenders": {OURS_TORCH: found, "torch": found | {"ratio": 2.0}}},
            head | {"contenders": {OURS_TORCH: found}},
        ],
    }


def sparse_gradient_results() -> dict:
    row = {"kept": 1.0, "blocks_ms": 0.0, "dhidden_ms": 1.0, "dweight_ms": 3.0}
    row |= {"dhidden_error": 2e-3, "dweight_error": 1e-3}
    less = row | {"threshold": 2.0**-9, "kept": 0.25, "blocks_ms": 1.0, "dweight_ms": 1.0, "dweight_error": 0.1}
    rows = [row | {"threshold": "cuBLAS"}, less]
    orders = ("vocabulary", "mean probability")
    found = [row | {"order": order} for order in orders for row in rows]
    return {"environment": ABOUT, "shape": (2048, 4096, 128256), "entropy": 2.0, "rows": found}


def counters_results() -> dict:
    kernel = dict.fromkeys(counters.METRICS, 50.0) | {"kernel": "cross_entropy_fused_kernel"}
    kernel |= {"ns": 5e5, "dram_read": 2.2e7, "dram_written": 2e7, "warps": dict.fromkeys(counters.WARPS, 0.0)}
    kernel["warps"] |= {"selected": 4.0, "barrier": 2.0, "long_scoreboard": 3.0, "wait": 1.0}
    return {"environment": ABOUT, "kernels": [kernel | {"case": "plain", "n_rows": 1000, "n_classes": 10000}]}


@pytest.mark.parametrize(
    ("page", "path", "results", "cells"),
    [
        (report.SPEED_PAGE, "COUNTERS", counters_results(), "plain, 1000×10000 | fused | 0.500 | 1.10 + 1.00 | 50% |"),
        (report.README, "LINEAR", linear_results(), "8192 · 4096 · 128256 | 1.05, 0.31 GiB | – |"),
        (report.LINEAR_PAGE, "SPARSE_GRADIENT", sparse_gradient_results(), "| 100%, 1.00, 2e-03 | 25%, 0.75, 1e-01 |"),
    ],
    ids=["counters", "linear", "sparse gradient"],
)
def test_a_page_without_its_newest_results_is_found(page, path, results, cells, tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    monkeypatch.setattr(report, path, file)
    empty = report.updated(page)
    assert cells not in empty
    file.write_text(json.dumps(results))
    assert cells in report.updated(page)
    assert outside_of_results(report.updated(page)) == outside_of_results(empty)
    file.write_text(json.dumps(results | {"environment": ABOUT | {"commit": "def"}}))
    assert "commit def" in report.updated(page)


def test_the_longest_waits_are_named():
    assert "| `long_scoreboard` 30%, `barrier` 20% |" in report.counters_section(counters_results())


def test_counters_are_read_of_every_case():
    names = ["ID", "Kernel Name", *(counters.METRICS | counters.WARPS).values()]
    launches = [name for name in counters.cases() for _ in range(2 if name == "`none`" else 1)]
    lines = [["", "", *["byte"] * (len(names) - 2)]]
    for i, name in enumerate(launches):
        lines.append([str(i), "cross_entropy_fused_kernel", *[f"{i},000.5"] * (len(names) - 2)])
        lines.append(["", f"another_kernel of {name}", *["0"] * (len(names) - 2)])
    text = io.StringIO()
    text.write("==PROF== Connected\n")
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([names, *lines])
    found = counters.of_cases(counters.parsed(text.getvalue()))
    assert [kernel["case"] for kernel in found] == launches
    assert [kernel["ns"] for kernel in found] == [1000 * i + 0.5 for i in range(len(launches))]
    assert found[3]["warps"] == dict.fromkeys(counters.STALLS, 3000.5)
    with pytest.raises(ValueError, match="zip"):
        counters.of_cases(found[1:])


def test_a_head_that_was_measured_apart_says_so():
    results = linear_results()
    assert report.linear_section(results).count("commit") == 1
    results["heads"][1]["environment"] = ABOUT | {"commit": "def"}
    assert "Llama 3 8B: a GPU, driver 1, 2026-01-01, commit def" in report.linear_section(results)


def test_plots_are_those_of_the_results():
    assert plots.digest(report.read()) in (ROOT / "docs" / "speed.svg").read_text(), "run: python -m benchmarks report"


def test_other_results_give_another_table_and_another_plot():
    results = report.read()
    other = copy.deepcopy(results)
    other["shapes"][0]["ce-kernels torch"]["train"]["ms"] *= 2
    assert report.section(other) != report.section(results)
    assert plots.digest(other) != plots.digest(results)


def test_few_classes_have_a_table():
    results = report.read()
    timing = {"train": {"ms": 3.0}, "forward": {"ms": 1.0}}
    shape = {"name": "segmentation", "size": (16, 21, 512), "dtype": "float32", "copy_ms": 2.0}
    found = [shape | {OURS_TORCH: timing, "torch": timing}, shape | {"name": "other", OURS_TORCH: timing}]
    section = report.section(results | {"few_classes": found})
    assert "| segmentation 16×21×512 | 1.50 (0.50) | 1.50 (0.50) |" in section
    assert "| other 16×21×512 | 1.50 (0.50) | – (–) |" in section


def test_bandwidth_counts_a_read_and_a_write():
    results = report.read()
    shape = {"n_rows": 4096, "n_classes": 250000}
    assert report.moved(shape, 1.0) == 4096
    assert report.spread({"low_ms": 1.5, "ms": 2.0, "high_ms": 2.5}) == 0.5
    for shape in results["shapes"]:
        shape["copy_ms"] = report.moved(shape, 1.0) / 4000
        shape[OURS_TORCH]["train"] = {"low_ms": 1.0, "ms": 2.0, "high_ms": 1.5}
    assert "move 4000 to 4000." in report.bandwidth(results)
    assert "at most 25.0% apart" in report.bandwidth(results)


def test_dtypes_have_a_table():
    point = {"train_ms": 3.0, "copy_ms": 2.0}
    timed = point | {"forward_ms": 1.0, "read_ms": 0.95}
    results = {"growth": {"dtypes": [timed | {"dtype": "bfloat16"}, timed | {"dtype": "float32"}]}}
    assert report.dtypes_table(results)[2:] == ["| training step | 1.50 | 1.50 |", "| forward | 95% | 95% |"]
    results["growth"]["dtypes"][1] = point | {"dtype": "float32"}
    assert report.dtypes_table(results)[2:] == ["| training step | 1.50 | 1.50 |"]


def test_memory_with_donation_is_a_column_of_its_own():
    results = report.read()
    shape = next(shape for shape in results["shapes"] if shape["name"] == "Llama 3")
    shape[OURS_TORCH]["donated_peak_bytes"] = shape["n_rows"] * shape["n_classes"]
    header, _, cells = report.memory_table(results)
    names, cells = header.split(" | "), cells.split(" | ")
    assert cells[names.index(f"{OURS_TORCH}, donated")] == "0.50"
    assert len(cells) == len(names)


# Of what torch.compile imports.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_what_compiles_when():
    torch._dynamo.reset()
    eager, compiled = (
        compiling.follow(loss, "cpu", (4, 6, 8, 10), 16)
        for loss in (torch_api.cross_entropy, compiling.compiled("aot_eager"))
    )
    torch._dynamo.reset()
    assert eager["first_call"]["graphs"] == 0
    assert [step["graphs"] for step in (compiled["first_call"], *compiled["batch_sizes"].values())] == [1, 1, 0, 0]
    # The README's limit: a new value of an option compiles anew.
    assert {option: step["graphs"] for option, step in compiled["options"].items()} == dict.fromkeys(
        compiling.OPTIONS, 1
    )

    eager["first_call"] |= {"seconds": 1.5, "kernels": ["fused", "divisor", "mean"]}
    eager["options"]["softcap"]["kernels"] = ["fused"]
    compiled["first_call"]["seconds"] = 9.3
    results = report.read()
    found = {"n_classes": 16, "first_rows": 4, "eager": eager, "torch.compile": compiled}
    section = report.section(results | {"compiling": found})
    assert "| compiled | 4 rows | then 6, 8, 10 rows | label_smoothing | z_loss | softcap |" in section
    assert "| kernels, eager | 3 | 0 | 0 | 0 | 1 | 0 | 0 |" in section
    assert "| graphs, `torch.compile` | 1 | 1 | 1 | 1 | 1 | 1 | 1 |" in section
    assert "empty caches: 1.5, under `torch.compile` 9.3." in section
    assert "This table:" not in section
    section = report.section(results | {"compiling": found | {"environment": ABOUT}})
    assert "This table: a GPU, driver 1, 2026-01-01, commit abc" in section


def test_kernels_that_compile_are_counted(monkeypatch):
    def loss(logits, labels):
        triton.knobs.runtime.jit_post_compile_hook(key="", fn=SimpleNamespace(name="fused"), compile={})
        return torch_api.cross_entropy(logits, labels)

    monkeypatch.setattr(compiling, "OPTIONS", {})
    found = compiling.follow(loss, "cpu", (4, 6), 16)
    assert found["first_call"]["kernels"] == found["batch_sizes"]["6"]["kernels"] == ["fused"]
    assert triton.knobs.runtime.jit_post_compile_hook is None


def test_caches_are_cold(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    with compiling.cold_caches():
        folder = Path(triton.knobs.cache.dir)
        folder.mkdir()
        assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parent == folder.parent
    assert not folder.exists()
    assert triton.knobs.cache.dir == "mine"


@pytest.mark.parametrize("page", [report.README, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_pages_claim_no_figure_without_a_result(page):
    found = FIGURE.search(outside_of_results(page.read_text()))
    assert found is None, f"measured figures belong between the markers: {found and found[0]!r}"


@pytest.mark.parametrize("claim", ["1.5× the copy", "takes 3 ms", "90 % of the limit", "2 times faster"])
def test_a_claim_without_a_result_is_found(claim):
    assert FIGURE.search(outside_of_results(README + claim))


@pytest.mark.parametrize("kernel", ["fused", "stats", "grad"])
@pytest.mark.parametrize("n_classes", [21, 128, 1000, 50257, 262144])
def test_tuning_tries_what_can_be_launched(kernel, n_classes):
    found = tune.candidates(kernel, n_classes, itemsize=2)
    assert len(set(found)) == len(found) >= 5
    for config in found:
        launch = tune.plan(tune.Task(kernel, 64, n_classes), config)
        assert launch.config == config
        # One 16-byte vector a thread at the least.
        assert config.block * max(config.rows, 1) * 2 >= config.num_ctas * config.num_warps * 32 * 16


@pytest.mark.parametrize("kernel", ["fused", "stats", "grad"])
@pytest.mark.parametrize(
    "options",
    [{}, {"soft_targets": True}, {"label_smoothing": 0.1}, {"in_place": True}, {"n_classes": 201, "dtype": "float16"}],
    ids=str,
)
def test_tuning_times_right_results_alone(kernel, options, monkeypatch, capsys):
    """With the kernels in the interpreter, and a clock that stands still."""
    monkeypatch.setattr(tune, "DEVICE", "cpu")
    monkeypatch.setattr(tune, "cuda_ms", lambda function, repeats=0: 1.0)
    monkeypatch.setattr(tune, "compile_all", lambda task, configs: [""] * len(configs))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    task = tune.Task(kernel=kernel, n_rows=5, **{"n_classes": 200, "dtype": "float32"} | options)
    config = Config(128, 1)
    (chosen,), (given,) = tune.tune(task, [None]), tune.tune(task, [config])
    assert given == tune.Timed(1.0, config)
    assert chosen.config == tune.plan(task, None).config
    made = tune.make
    monkeypatch.setattr(
        tune, "make", lambda task: made(task)._replace(loss=made(task).loss + 1, gradient=made(task).gradient * 1.1)
    )
    assert tune.tune(task, [config]) == []
    assert "wrong: Config(" in capsys.readouterr().out


@pytest.mark.parametrize(
    "chosen",
    [{}, {"weight": torch.rand(50) + 0.5}, {"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"softcap": 3.0}],
    ids=lambda chosen: str(*chosen),
)
@pytest.mark.parametrize("kind", ["labels", "half of them", "probabilities"])
def test_the_first_rows_of_a_step_are_checked(kind, chosen):
    logits, labels = torch.randn(100, 50, dtype=torch.float64, requires_grad=True), torch.randint(0, 50, (100,))
    labels[::2] = torch.where(torch.tensor(kind == "half of them"), -100, labels[::2])
    targets = torch.randn(100, 50).double().softmax(-1) if kind == "probabilities" else labels
    upstream = torch.tensor(3.0, dtype=torch.float64)
    loss = torch_api.cross_entropy(logits, targets, **chosen)
    (gradient,) = torch.autograd.grad(loss, logits, upstream)
    right = run.right_step(logits, targets, upstream, **chosen)
    assert len(right) == timing.CHECKED_ROWS
    assert not timing.wrong_gradient(gradient, right)
    for other in (gradient * 1.02, gradient.roll(1, 0), gradient * torch.nan):
        assert "gradient elements" in timing.wrong_gradient(other, right)
    with pytest.raises(AssertionError, match="plain: wrong"):
        timing.ours_is_right("plain", "wrong")


@pytest.mark.parametrize("wrong", ["", "loss", "off target", "target"])
def test_wrong_results_are_refused(wrong):
    logits = torch.randn(8, 100, requires_grad=True)
    labels = torch.randint(0, 100, (8,))
    loss = F.cross_entropy(logits, labels)
    (gradient,) = torch.autograd.grad(loss, logits)
    right = (loss.item(), gradient.double())
    loss = loss * (1.001 if wrong == "loss" else 1.0)
    if wrong == "off target":
        gradient = torch.where(F.one_hot(labels, 100) == 1, gradient, 0.0)
    if wrong == "target":
        gradient = gradient + F.one_hot(labels, 100) / 8
    assert bool(mistake(loss, gradient, right, rtol=2.0**-7)) == bool(wrong)
