"""Without a GPU the kernels run under Triton's interpreter, whose variable must be set before triton's import.

JAX's CPU counts as eight devices, for tests of sharding, with or without a GPU beside it.
"""

import contextlib
import os

import torch

HAS_GPU = torch.cuda.is_available()
XLA_FLAGS = "--xla_force_host_platform_device_count=8"
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    # Of programs that run once, LLVM's optimisation takes a quarter of the time.
    XLA_FLAGS += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}"

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

jax.config.update("jax_enable_x64", True)
# On GPUs JAX multiplies float32 matrices in tf32 unless it is asked not to; the bounds here are float32's.
jax.config.update("jax_default_matmul_precision", "highest")
settings.register_profile("default", deadline=None, derandomize=True, max_examples=15)
settings.load_profile("default")


def pytest_addoption(parser):
    parser.addoption("--require-gpu", action="store_true", help="fail, instead of skip, tests that need a GPU")


def pytest_configure(config):
    # The interpreter's arithmetic on −inf, NaN and padded lanes is NumPy's, with NumPy's warnings.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
    config.addinivalue_line("filterwarnings", "ignore:TRITON_DEFAULT_FP_FUSION is unset:UserWarning")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not HAS_GPU:
        if item.config.getoption("--require-gpu"):
            pytest.fail("needs a GPU, and none was found")
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def nan_filled_outputs(monkeypatch):
    """Every buffer that a kernel must write starts as NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    from ce_kernels import interpreter

    run = interpreter.run

    def poisoned(launch, arguments):
        for output in launch.outputs:
            array = np.asarray(arguments[output.name])
            array.fill(np.nan if array.dtype.kind != "i" else -(2**31))
        run(launch, arguments)

    monkeypatch.setattr(interpreter, "run", poisoned)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def rng(request):
    """A generator seeded by the test's name."""
    return np.random.default_rng(list(request.node.nodeid.encode()))


@contextlib.contextmanager
def planned_anew():
    """Launches of before are forgotten, and those of here after it."""
    from ce_kernels import launch
    from torch_api import launch as torch_launch

    def forget():
        for module, prefix in ((launch, "plan"), (torch_launch, "_plan")):
            for kernel in ("stats", "grad", "fused"):
                getattr(module, f"{prefix}_{kernel}").cache_clear()

    forget()
    yield
    forget()


@pytest.fixture
def clusters(monkeypatch):
    """PyTorch's launches spread rows over eight multiprocessors, in steps of 2048 columns of two bytes."""
    from ce_kernels import tuning
    from torch_api import launch as torch_launch

    if not HAS_GPU:
        monkeypatch.setattr(torch_launch, "has_clusters", lambda capability, spread: True)
    monkeypatch.setattr(tuning, "TILED", dict.fromkeys(tuning.TILED, 0))
    monkeypatch.setattr(tuning, "LONG_ROW", 0)
    for table in [name for name in vars(tuning) if name.startswith("FUSED_CLUSTERS")] + ["STATS_FEW_ROWS"]:
        monkeypatch.setattr(tuning, table, ((None, tuning.Config(2048, 1, 8, unroll=2, backwards=True)),))
    with planned_anew():
        yield


@pytest.fixture(params=[2])
def shared_rows(monkeypatch, request):
    """Both front ends' launches let programs share a row, of two steps of 512 bytes each, or as many as asked."""
    import jax_api.launch
    from ce_kernels import tuning
    from jax_api import sharding
    from torch_api import launch as torch_launch

    if not HAS_GPU:
        monkeypatch.setattr(torch_launch, "can_share_rows", lambda capability, multiprocessors: True)
        monkeypatch.setattr(jax_api.launch, "shared_rows", lambda: True)
    monkeypatch.setattr(tuning, "TILED", dict.fromkeys(tuning.TILED, 0))
    monkeypatch.setattr(tuning, "FEW_ROWS", 0)
    for table in [name for name, value in vars(tuning).items() if name.startswith("SHARED") and value]:
        config = tuning.Config(256, 1, unroll=2, backwards=True, steps=request.param)
        monkeypatch.setattr(tuning, table, ((None, config),))
    sharding._operation.cache_clear()
    with planned_anew():
        yield
    sharding._operation.cache_clear()


@pytest.fixture
def one_row_a_program(monkeypatch):
    """Short rows, too, have programs of their own."""
    from ce_kernels import tuning

    monkeypatch.setattr(tuning, "TILED", dict.fromkeys(tuning.TILED, 0))
    with planned_anew():
        yield


@pytest.fixture
def small_tiles(monkeypatch):
    """Every row is in a tile of four, walked eight classes a step; where classes are neighbours, a row a thread."""
    from ce_kernels import tuning

    def choose(kernel, problem, **_):
        return tuning.Config(8, 1, rows=4, row_a_thread=problem.class_stride == 1)

    monkeypatch.setattr(tuning, "choose", choose)
    with planned_anew():
        yield
