"""A problem's shapes and dtypes become frozen launches, without data and without a framework.

A front end describes its arrays as a `Problem`, gets a `Launch`, allocates the launch's outputs and passes arrays by
the kernel's parameter names; an operand left out is None, which removes its code from the kernel. A `config` replaces
the one that `ce_kernels.tuning` would choose.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from ce_kernels import tuning
from ce_kernels.tuning import Config

# Programs of a row, at the most.
SHARED_BY = 64
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Problem:
    """Rows of logits as a kernel sees them; strides in elements; `total_classes` is V where a row is a slice of it.

    With rows_inner, row i starts at (i // rows_inner)·outer_stride + (i % rows_inner)·stride, in logits and dlogits;
    dlogits_stride None means n_classes. class_stride: from class to class, where the classes of a row lie apart; hard
    labels only.
    `aligned`: the logits' first element lies on a 16-byte boundary, so that whole groups of 16 bytes may be read;
    `target_aligned`: that of the soft targets does.
    `clusters`: one program may span several multiprocessors; `has_clusters` says where. `shared_rows`: several programs
    may share a row; `can_share_rows` says where.
    `softcap`: there is one, and its arithmetic takes longer than the memory. `label_smoothing`: there is some, and the
    sum of a row's logits takes registers. `overlapped`: a launch may begin while the one before it ends, and kernels
    wait for that (programmatic dependent launch); `has_overlap` says where.
    """

    n_rows: int
    n_classes: int
    logits_dtype: str
    soft_targets: bool
    logits_stride: int
    target_stride: int
    total_classes: int
    rows_inner: int | None = None
    logits_outer_stride: int | None = None
    dlogits_stride: int | None = None
    dlogits_outer_stride: int | None = None
    class_stride: int = 1
    dlogits_class_stride: int = 1
    aligned: bool = True
    target_aligned: bool = True
    clusters: bool = False
    shared_rows: bool = False
    softcap: bool = False
    label_smoothing: bool = False
    overlapped: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes a logit."""
        return ITEMSIZE[self.logits_dtype]

    @property
    def row_bytes(self) -> int:
        """What a pass reads of one row, logits and soft targets, in the logits' dtype."""
        return self.n_classes * self.itemsize * (2 if self.soft_targets else 1)

    @property
    def group(self) -> int:
        """How many neighbouring logits one thread reads at once: 16 bytes."""
        return 16 // self.itemsize

    @property
    def shifted(self) -> bool:
        """Whether rows start between 16-byte boundaries, so that kernels walk them from the boundary before."""
        return self.aligned and any(
            stride % self.group for stride in _levels(self.logits_stride, self.logits_outer_stride)
        )

    def wide_stores(self, in_place: bool) -> bool:
        """Whether the groups of 16 bytes of every row of dlogits are those of the logits."""
        if in_place:
            return True
        reads = _levels(self.logits_stride, self.logits_outer_stride)
        writes = _levels(self.dlogits_stride or self.n_classes, self.dlogits_outer_stride)
        return all((read - write) % self.group == 0 for read, write in zip(reads, writes, strict=True))

    @property
    def wide_targets(self) -> bool:
        """Whether rows that start between 16-byte boundaries have the groups of every row of the soft targets."""
        same = self.rows_inner is None and (self.logits_stride - self.target_stride) % self.group == 0
        return self.soft_targets and self.shifted and self.target_aligned and same

    @property
    def compute_dtype(self) -> str:
        """fp64 for fp64 logits, fp32 for every other dtype."""
        return "float64" if self.logits_dtype == "float64" else "float32"

    @property
    def scalars_in_memory(self) -> bool:
        """Launch parameters hold floats as fp32, so fp64 problems pass their scalars as 0-d arrays."""
        return self.logits_dtype == "float64"


def _signals_cheaply(problem: Problem, programs: int) -> bool:
    # Programs let the next launch begin one after the other, two in a nanosecond: too slow for many short ones.
    return programs <= 2048 or problem.row_bytes * problem.n_rows > 8192 * programs


def _levels(stride: int, outer_stride: int | None) -> tuple[int, ...]:
    return (stride,) if outer_stride is None else (stride, outer_stride)


def has_clusters(capability: int, *, spread: bool) -> bool:
    """Whether a program may span several multiprocessors of a GPU of compute capability 90, 100, …

    Triton 3.7 fails to compile reductions over them, 3.8 those of more than one number: of rows whose target mass is
    spread over all classes (soft targets, label smoothing).
    """
    return capability >= 90 and _triton_version() >= ((3, 9) if spread else (3, 8))


def can_share_rows(capability: int, multiprocessors: int) -> bool:
    """Whether programs may share a row, on a GPU of compute capability 80, 90, … with so many multiprocessors.

    They wait for one another, so those of a row, up to SHARED_BY, must all find room at the same time, also where other
    launches take some.
    """
    return capability >= 80 and multiprocessors >= 100


def has_overlap(capability: int) -> bool:
    """Whether launches may overlap on a GPU of compute capability 90, 100, …"""
    return capability >= 90


@lru_cache
def _triton_version() -> tuple[int, ...]:
    # Not the distribution's: nightly builds of PyTorch bring a Triton under another name.
    import triton

    return tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])


@dataclass(frozen=True)
class Output:
    """One array that a kernel writes: its parameter, shape and dtype name; whether it must hold zeros before."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    zeroed: bool = False


@dataclass(frozen=True)
class Launch:
    """All that is known of a kernel call without data.

    `constants` are the kernel's constexpr parameters, and the rows' levels and the classes' strides where there are
    any; `in_place` means that dlogits overwrites the logits.
    """

    kernel: str
    grid: tuple[int]
    outputs: tuple[Output, ...]
    constants: tuple[tuple[str, int | bool | None], ...]
    in_place: bool
    config: Config

    @property
    def options(self) -> dict[str, int | bool]:
        """The compiler's options, by Triton's names."""
        options = {
            "num_warps": self.config.num_warps,
            "num_ctas": self.config.num_ctas,
            "num_stages": self.config.num_stages,
            # Both kernels that make a gradient round it alike; fused multiply-adds would save next to nothing.
            "enable_fp_fusion": False,
        }
        if self.config.max_registers is not None:
            options["maxnreg"] = self.config.max_registers
        if self.kernel.endswith("fused_kernel") and dict(self.constants)["OVERLAPPED"]:
            # Right behind the launch that counts its labels.
            options["launch_pdl"] = True
        return options


@lru_cache(maxsize=4096)
def plan_stats(problem: Problem, *, with_argmax: bool, config: Config | None = None) -> Launch:
    """The launch that writes loss, lse, s = Σq and (with_argmax) the argmax of every row."""
    outputs = _row_outputs(problem)
    if with_argmax:
        outputs += (Output("predicted_ptr", (problem.n_rows,), "int32"),)
    return _plan("stats", problem, outputs, {}, config)


@lru_cache(maxsize=4096)
def plan_grad(
    problem: Problem,
    *,
    dloss_stride: int,
    dlse_stride: int,
    dtarget_dtype: str | None,
    in_place: bool,
    config: Config | None = None,
) -> Launch:
    """The launch that writes dlogits, and dtarget where a dtype for it is named, from lse, s and upstream gradients."""
    outputs = _gradient_output(problem, in_place)
    if dtarget_dtype is not None:
        outputs += (Output("dtarget_ptr", (problem.n_rows, problem.n_classes), dtarget_dtype),)
    strides = {"DLOSS_STRIDE": dloss_stride, "DLSE_STRIDE": dlse_stride}
    return _plan("grad", problem, outputs, strides, config, in_place=in_place)


@lru_cache(maxsize=4096)
def plan_fused(problem: Problem, *, denominator_stride: int, in_place: bool, config: Config | None = None) -> Launch:
    """The launch that writes loss, lse, s and dlogits of rows whose upstream gradient is 1 / denominator."""
    if config is None:
        config = tuning.choose("fused", problem, in_place=in_place)
    outputs = _row_outputs(problem) + _gradient_output(problem, in_place) + _exchange(problem, config)
    strides = {"DENOMINATOR_STRIDE": denominator_stride}
    return _plan("fused", problem, outputs, strides, config, in_place=in_place)


def _row_outputs(problem: Problem) -> tuple[Output, ...]:
    names = ("loss_ptr", "lse_ptr", "target_sum_ptr")
    return tuple(Output(name, (problem.n_rows,), problem.compute_dtype) for name in names)


def _gradient_output(problem: Problem, in_place: bool) -> tuple[Output, ...]:
    if in_place:
        return ()
    return (Output("dlogits_ptr", (problem.n_rows, problem.n_classes), problem.logits_dtype),)


def _exchange(problem: Problem, config: Config) -> tuple[Output, ...]:
    """What the programs that share a row say of it: maximum and sum of exponentials; Σq·x and Σq of spread mass."""
    programs, _ = _parts(problem, config)
    if programs == 1:
        return ()
    numbers = 4 if problem.soft_targets or problem.label_smoothing else 2
    return (Output("exchange_ptr", (problem.n_rows, programs, numbers), "int32", zeroed=True),)


def _parts(problem: Problem, config: Config) -> tuple[int, int]:
    """How many programs share a row, and how many positions of it each has, but the last, which may have fewer."""
    blocks = -(-_positions(problem) // config.block)
    steps = max(config.steps or blocks, -(-blocks // SHARED_BY))
    return -(-blocks // steps), steps * config.block


def _positions(problem: Problem) -> int:
    """Of a row, from the 16-byte boundary before it, at the most."""
    return problem.n_classes + (problem.group - 1 if problem.shifted else 0)


def _plan(
    kernel: str,
    problem: Problem,
    outputs: tuple[Output, ...],
    strides: dict[str, int],
    config: Config | None,
    *,
    in_place: bool = False,
) -> Launch:
    if config is None:
        config = tuning.choose(kernel, problem, in_place=in_place)
    constants = {
        # Row length and strides are constants: as run-time values they would cost the 16-byte loads under jax-triton.
        "N_CLASSES": problem.n_classes,
        "TOTAL_CLASSES": problem.total_classes,
        "LOGITS_STRIDE": problem.logits_stride,
        "TARGET_STRIDE": problem.target_stride,
        **strides,
        "SOFT_TARGETS": problem.soft_targets,
        "SCALARS_IN_MEMORY": problem.scalars_in_memory,
        "BLOCK": config.block,
    }
    # Run-time values: a constant sequence length would compile every length anew.
    of_logits = {"outer_stride": problem.logits_outer_stride}
    of_dlogits = {"outer_stride": problem.dlogits_outer_stride}
    programs, positions = problem.n_rows, problem.n_classes
    if config.rows:
        inner = problem.rows_inner or problem.n_rows
        programs = -(-inner // config.rows) * (problem.n_rows // max(inner, 1))
        constants |= {"ROWS": config.rows, "rows_inner": inner}
        if kernel != "grad":
            constants["ROW_A_THREAD"] = config.row_a_thread
        of_logits["class_stride"] = None if problem.class_stride == 1 else problem.class_stride
        of_dlogits["class_stride"] = None if problem.dlogits_class_stride == 1 else problem.dlogits_class_stride
    else:
        constants |= {"GROUP": problem.group, "SHIFTED": problem.shifted, "WIDE_TARGETS": problem.wide_targets}
        positions = _positions(problem)
        if problem.rows_inner is not None:
            constants["rows_inner"] = problem.rows_inner
        if kernel != "grad":
            constants |= {"UNROLL": config.unroll, "CLUSTER": config.num_ctas > 1}
        if kernel != "stats":
            constants["WIDE_STORES"] = problem.wide_stores(in_place)
        if kernel == "fused":
            shared_by, part = _parts(problem, config)
            constants |= {"BACKWARDS": config.backwards, "PROGRAMS": shared_by, "SLICE": part}
            programs *= shared_by
    constants |= {f"logits_{name}": value for name, value in of_logits.items()}
    if kernel != "stats":
        constants["DLOGITS_STRIDE"] = problem.dlogits_stride or problem.n_classes
        constants |= {f"dlogits_{name}": value for name, value in of_dlogits.items()}
    if kernel == "grad":
        constants["BLOCKS_PER_ROW"] = -(-positions // config.block)
        programs *= constants["BLOCKS_PER_ROW"]
    else:
        constants["OVERLAPPED"] = problem.overlapped and _signals_cheaply(problem, programs)
    return Launch(
        kernel=f"cross_entropy_{'tile_' if config.rows else ''}{kernel}_kernel",
        grid=(programs,),
        outputs=outputs,
        constants=tuple(constants.items()),
        in_place=in_place,
        config=config,
    )
