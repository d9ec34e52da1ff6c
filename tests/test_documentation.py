"""The README's code runs, and the docstrings' examples hold."""

import doctest
import re
from pathlib import Path

import pytest

import jax_api.losses
import jax_api.optax_losses
import torch_api.losses
import torch_api.module
import torch_api.patching
import torch_api.trainers

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
BLOCKS = [
    pytest.param(block, page, id=f"{page}: {block.split(chr(10))[-2]}")
    for page in PAGES
    for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
]


def test_readme_has_code():
    assert len(BLOCKS) >= 4


@pytest.mark.parametrize(("block", "page"), BLOCKS)
def test_code_runs(block, page):
    exec(compile(block, page, "exec"), {"__name__": "page"})


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_files_that_exist(page):
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / path).exists(), path


MODULES = [
    torch_api.losses,
    torch_api.module,
    torch_api.patching,
    torch_api.trainers,
    jax_api.losses,
    jax_api.optax_losses,
]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_docstring_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
