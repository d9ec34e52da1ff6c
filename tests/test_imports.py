"""Who imports whom, and the wheel."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# package: (modules that its import may not load, modules made impossible to import meanwhile)
RULES = {
    "ce_kernels": ("jax", "jaxlib", "torch", "triton"),
    "jax_api": ("torch", "triton", "jax_triton"),
    "torch_api": ("jax", "jaxlib", "triton", "jax_triton"),
}

PROBE = """
import sys
forbidden = {forbidden!r}
for name in forbidden:
    sys.modules[name] = None  # importing it raises ImportError
{statement}
loaded = [name for name in forbidden if sys.modules.get(name) is not None]
sys.exit(f"loaded: {{loaded}}" if loaded else 0)
"""


def probe(statement: str, forbidden: tuple[str, ...], block: bool) -> subprocess.CompletedProcess:
    code = PROBE.format(statement=statement, forbidden=forbidden)
    if not block:
        code = code.replace("    sys.modules[name] = None", "    pass")
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("block", [True, False], ids=["absent", "present"])
@pytest.mark.parametrize("package", RULES)
def test_import_isolation(package, block):
    result = probe(f"import {package}", RULES[package], block)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("block", [True, False], ids=["absent", "present"])
def test_import_isolation_can_fail(block):
    result = probe("import ce_kernels, torch", ("torch",), block)
    assert result.returncode != 0
    assert "torch" in result.stderr


@pytest.mark.parametrize(
    ("package", "blocked", "arrays"),
    [
        ("torch_api", ("jax", "jaxlib", "triton"), "import torch; x, y = torch.zeros(2, 3), torch.tensor([0, 1])"),
        ("jax_api", ("torch", "triton"), "import jax.numpy as jnp; x, y = jnp.zeros((2, 3)), jnp.array([0, 1])"),
    ],
)
def test_the_other_framework_and_triton_may_be_absent(package, blocked, arrays):
    use = f"import {package}; {arrays}; assert abs(float({package}.cross_entropy(x, y)) - 1.0986123) < 1e-5"
    if package == "jax_api":
        # JAX traces the kernels for every platform where jax-triton is installed.
        use = "import importlib.util as u; find = u.find_spec; " + (
            "u.find_spec = lambda name, *a: None if name == 'jax_triton' else find(name, *a); " + use
        )
    result = probe(use, blocked, block=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(("package", "framework"), [("jax_api", "jax"), ("torch_api", "torch")])
def test_a_missing_framework_is_named(package, framework):
    result = probe(f"import {package}", (framework,), block=True)
    assert f"got {package} without {framework}; required: {framework}" in result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("ce_kernels-*.whl"))


def test_wheel_holds_the_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"ce_kernels", "jax_api", "torch_api"}
    for package in tops:
        assert f"{package}/py.typed" in names


def test_wheel_metadata(wheel):
    metadata = zipfile.ZipFile(wheel).read(next(n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("METADATA")))
    text = metadata.decode()
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Python: >=3.12" in text
    assert "Requires-Dist: triton>=3.7; sys_platform == 'linux'" in text
    for extra in ("jax", "torch", "examples", "test", "dev"):
        assert f"Provides-Extra: {extra}" in text


def test_wheel_in_an_empty_environment(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env" / "lib").glob("python*")) / "site-packages"
    zipfile.ZipFile(wheel).extractall(site)
    code = "import ce_kernels; print(ce_kernels.__version__, ce_kernels.Options())"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        [python, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("0.1.0 Options(ignore_index=-100")


def test_one_version():
    from importlib.metadata import version

    import ce_kernels

    assert version("ce-kernels") == ce_kernels.__version__
    assert f"## {ce_kernels.__version__}" in (ROOT / "CHANGELOG.md").read_text()
