"""What this JAX can run: the implementation that a call gets, and jax-triton made usable."""

import importlib
import importlib.util
import inspect
import os
import re
from functools import lru_cache
from importlib.metadata import version
from types import ModuleType

import jax

from ce_kernels.launch import can_share_rows, has_clusters
from ce_kernels.spec import check_implementation, fail

# PTX for the oldest supported GPU runs on every later one: for programs lowered on a host without a GPU.
BASELINE_CAPABILITY = 80
VERSIONS = "jax 0.11 or 0.12 with jax-triton ≥ 0.4.1 (pip install 'ce-kernels[jax]')"


def interpreting() -> bool:
    """Whether Triton's interpreter is on, which runs the kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose_implementation(implementation: str | None) -> str | None:
    """'triton', 'reference' or None (by platform, at lowering); an impossible wish raises."""
    check_implementation(implementation)
    if implementation == "reference":
        return "reference"
    on_gpu = jax.default_backend() == "gpu"
    obstacle = _obstacle()
    if obstacle is not None:
        if implementation == "triton" or on_gpu:
            wish = "implementation='triton'" if implementation == "triton" else "a GPU backend"
            fail(RuntimeError, f"{wish} with {obstacle}", VERSIONS, "implementation='reference' to do without kernels")
        return "reference"
    if implementation == "triton" and not on_gpu and not interpreting():
        fail(
            RuntimeError,
            f"implementation='triton' on the {jax.default_backend()} backend",
            "a GPU, or Triton's interpreter (environment variable TRITON_INTERPRET=1)",
            "implementation=None to choose by platform",
        )
    return implementation


@lru_cache
def _obstacle() -> str | None:
    """Why the kernels cannot be launched from this JAX, or None."""
    if importlib.util.find_spec("jax_triton") is None:
        return "no jax-triton installed"
    found = version("jax_triton")
    fits = (0, 11) <= jax.__version_info__ < (0, 13)
    if not fits or tuple(int(part) for part in re.findall(r"\d+", found)[:3]) < (0, 4, 1):
        return f"jax {jax.__version__} and jax-triton {found}"
    return None


def compute_capability() -> int | None:
    """What to compile for: the oldest of the GPUs, whose PTX runs on all of them; None leaves it to jax-triton."""
    if jax.default_backend() != "gpu":
        return BASELINE_CAPABILITY
    found = _capabilities()
    return None if len(found) <= 1 else min(found)


def clusters(*, spread: bool) -> bool:
    """Whether every GPU can run one program on several multiprocessors; spread: as `has_clusters` has it."""
    return jax.default_backend() == "gpu" and has_clusters(min(_capabilities(), default=0), spread=spread)


def shared_rows() -> bool:
    """Whether programs may share a row on every GPU."""
    multiprocessors = min((getattr(device, "core_count", 0) for device in jax.devices()), default=0)
    return jax.default_backend() == "gpu" and can_share_rows(min(_capabilities(), default=0), multiprocessors)


def _capabilities() -> frozenset[int]:
    found = (str(getattr(device, "compute_capability", "")).replace(".", "") for device in jax.devices())
    # Devices that are not NVIDIA's name an architecture instead.
    return frozenset(int(capability) if capability.isdigit() else 0 for capability in found)


@lru_cache
def jax_triton() -> ModuleType:
    """jax-triton, without its two faults: a forgotten TRITON_CACHE_DIR, and a rule that jax 0.12 calls differently."""
    # jax-triton 0.4 deletes the user's TRITON_CACHE_DIR, which other Triton programs of the process rely on.
    cache_dir = os.environ.get("TRITON_CACHE_DIR")
    import jax_triton

    if cache_dir is not None:
        os.environ["TRITON_CACHE_DIR"] = cache_dir
    _mend_dead_code_rule(importlib.import_module("jax_triton.triton_lib"))
    return jax_triton


def _mend_dead_code_rule(library: ModuleType) -> None:
    """Removes jax-triton's own rule for unused calls where this jax would call it with one argument more.

    jax-triton 0.4.1 registers a rule of (used_outputs, equation), which keeps every call; jax 0.12 passes
    (used_outputs, live_inputs, equation). jax's default rule, which then applies, drops calls whose outputs are unused.
    """
    rules = library.pe.dce_rules
    rule = rules.get(library.triton_kernel_call_p)
    default = library.pe._default_dce_rule
    if rule is not None and len(inspect.signature(rule).parameters) < len(inspect.signature(default).parameters):
        del rules[library.triton_kernel_call_p]
