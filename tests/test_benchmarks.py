"""The benchmarks refuse wrong results, and the README claims no figure that the committed results do not hold."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import plots, report, tune
from benchmarks.names import OURS_TORCH
from benchmarks.timing import mistake
from ce_kernels import Problem

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FIGURE = re.compile(r"\d(\.\d+)?\s?(×|%|ms\b|µs|us\b|GB|GiB|TB|times faster|x faster)")


def outside_of_results(text: str) -> str:
    """The prose: without the generated section and without code."""
    before, rest = text.split(report.BEGIN)
    return re.sub(r"```.*?```|`[^`]*`", "", before + rest.split(report.END)[1], flags=re.DOTALL)


def test_readme_tables_are_those_of_the_results():
    assert report.updated_readme() == README, "run: python -m benchmarks report"


def test_plots_are_those_of_the_results():
    assert plots.digest(report.read()) in (ROOT / "docs" / "speed.svg").read_text(), "run: python -m benchmarks report"


def test_other_results_give_another_table_and_another_plot():
    results = report.read()
    other = copy.deepcopy(results)
    other["shapes"][0]["ce-kernels torch"]["train"]["ms"] *= 2
    assert report.section(other) != report.section(results)
    assert plots.digest(other) != plots.digest(results)


def test_memory_with_donation_is_a_column_of_its_own():
    results = report.read()
    shape = next(shape for shape in results["shapes"] if shape["name"] == "Llama 3")
    shape[OURS_TORCH]["donated_peak_bytes"] = shape["n_rows"] * shape["n_classes"]
    header, _, cells = report.memory_table(results)
    names, cells = header.split(" | "), cells.split(" | ")
    assert cells[names.index(f"{OURS_TORCH}, donated")] == "0.50"
    assert len(cells) == len(names)


def test_readme_claims_no_figure_without_a_result():
    found = FIGURE.search(outside_of_results(README))
    assert found is None, f"measured figures belong between the markers: {found and found[0]!r}"


@pytest.mark.parametrize("claim", ["1.5× the copy", "takes 3 ms", "90 % of the limit", "2 times faster"])
def test_a_claim_without_a_result_is_found(claim):
    assert FIGURE.search(outside_of_results(README + claim))


@pytest.mark.parametrize("kernel", ["fused", "stats", "grad"])
@pytest.mark.parametrize("n_classes", [1000, 50257, 262144])
def test_tuning_tries_what_can_be_launched(kernel, n_classes):
    problem = Problem(64, n_classes, "bfloat16", False, n_classes, 1, n_classes, clusters=True)
    found = tune.candidates(kernel, n_classes, itemsize=2)
    assert len(set(found)) == len(found) >= 5
    for config in found:
        launch = tune.plan(kernel, problem, config)
        assert launch.config == config
        # One 16-byte vector a thread at the least.
        assert config.block * 2 >= config.num_ctas * config.num_warps * 32 * 16


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
