"""The README's code runs, the docstrings' examples hold, and the README's tables are those of the committed results."""

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
from benchmarks import report

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
<<<<<<< HEAD
PAGES = {"README.md": README} | {f"docs/{page.name}": page.read_text() for page in sorted(ROOT.glob("docs/*.md"))}
BLOCKS = [(name, code) for name, text in PAGES.items() for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
=======
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
BLOCKS = [
    pytest.param(block, page, id=f"{page}: {block.split(chr(10))[-2]}")
    for page in PAGES
    for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
]
>>>>>>> torch


def test_readme_has_code():
    assert len(BLOCKS) >= 4


<<<<<<< HEAD
@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=[f"{page}: {code.split(chr(10))[0]}" for page, code in BLOCKS])
def test_code_of_the_pages_runs(page, block):
=======
@pytest.mark.parametrize(("block", "page"), BLOCKS)
def test_code_runs(block, page):
>>>>>>> torch
    exec(compile(block, page, "exec"), {"__name__": "page"})


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_files_that_exist(page):
<<<<<<< HEAD
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", PAGES[page]):
=======
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text()):
>>>>>>> torch
        assert ((ROOT / page).parent / path).exists(), path


MODULES = [
    torch_api.losses,
    torch_api.module,
<<<<<<< HEAD
    torch_api.linear,
    torch_api.linear_module,
    jax_api.losses,
    jax_api.optax_losses,
    jax_api.linear,
    ce_kernels.linear,
=======
    torch_api.patching,
    torch_api.trainers,
    jax_api.losses,
    jax_api.optax_losses,
>>>>>>> torch
]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_docstring_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_readme_tables_are_those_of_the_results():
    assert report.updated_readme() == README, "run: python -m benchmarks report"
