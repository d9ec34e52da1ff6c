"""The README's code runs, and the docstrings' examples hold."""

import doctest
import re
from pathlib import Path

import pytest

import ce_kernels.linear
import jax_api.linear
import jax_api.losses
import jax_api.optax_losses
import torch_api.linear
import torch_api.linear_module
import torch_api.losses
import torch_api.module
import torch_api.patching
import torch_api.trainers

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_readme_has_code():
    assert len(BLOCKS) >= 4


@pytest.mark.parametrize("block", BLOCKS, ids=[block.split("\n")[0] for block in BLOCKS])
def test_readme_code_runs(block):
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_page_code_runs_in_order(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks
    namespace = {"__name__": page.stem}
    for block in blocks:
        exec(compile(block, page.name, "exec"), namespace)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_pages_name_files_that_exist(page):
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", prose):
        assert (page.parent / path).exists(), path


MODULES = [
    torch_api.losses,
    torch_api.module,
    torch_api.linear,
    torch_api.linear_module,
    torch_api.patching,
    torch_api.trainers,
    jax_api.losses,
    jax_api.optax_losses,
    jax_api.linear,
    ce_kernels.linear,
]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_docstring_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
