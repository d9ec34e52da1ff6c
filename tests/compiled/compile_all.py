"""Compiles every kernel for every dtype, and for every GPU generation, without a GPU, and prints how many."""

import json
import re
from types import SimpleNamespace

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ce_kernels import Options, Problem, kernels, plan_fused, plan_grad, plan_stats

POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "float64": "*fp64", "int32": "*i32"}
TARGETS = [GPUTarget("cuda", capability, 32) for capability in (80, 90, 100)] + [GPUTarget("hip", "gfx942", 64)]
DTYPES = [
    ("bfloat16", "float32"),
    ("float16", "bfloat16", "float32", "float64"),
    ("bfloat16", "float64"),
    ("bfloat16",),
]
PLAIN = Options()
EVERY = Options(label_smoothing=0.1, z_loss=1e-3, softcap=30.0, logit_scale=0.5)


def compile_launch(launch, problem, options, weighted, loss_types, target):
    kernel = getattr(kernels, launch.kernel)
    compute = POINTERS[problem.compute_dtype]
    labels = POINTERS[problem.logits_dtype] if problem.soft_targets else "*i64"
    types = {"logits_ptr": POINTERS[problem.logits_dtype], "target_ptr": labels, **loss_types}
    types |= {output.name: POINTERS[output.dtype] for output in launch.outputs}
    types |= {"weight_ptr": "*fp32"} if weighted else {}
    for name, value in options.scalars().items():
        if value is not None:
            types[name] = "i32" if name == "ignore_index" else compute if problem.scalars_in_memory else "fp32"
    # The second row level is no constant, nor are strides of classes; they are multiples of 16 elements where V is.
    levels = {name: "i32" for name, value in launch.constants if name.islower() and value is not None}
    types |= levels
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    constants = {name: dict(launch.constants).get(name) for name, kind in signature.items() if kind == "constexpr"}
    attrs = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    divisible = {name for name in levels if dict(launch.constants)[name] % 16 == 0}
    if not launch.config.rows:
        divisible.discard("rows_inner")  # do_not_specialize
    wide = [i for i, name in enumerate(signature) if name in divisible]
    attrs |= {(i,): [["tt.divisibility", 16]] for i in wide}
    # Kernels ask the driver which GPU they are for.
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: target))
    compiled = triton.compile(ASTSource(kernel, signature, constants, attrs), target=target, options=launch.options)
    assert compiled.asm["cubin" if target.backend == "cuda" else "hsaco"]
    assert not launch.options.get("launch_pdl") or constants["OVERLAPPED"]
    if target.backend == "cuda":
        assert waits_before_it_reads(compiled.asm["ptx"]) == bool(constants.get("OVERLAPPED"))
        if launch.config.num_ctas > 1:
            check_end_of_cluster(compiled.asm["ptx"])
    if {"logits_outer_stride", "logits_class_stride"} & set(levels) and target.backend == "cuda":
        assert re.search(r"ld\.global[^\n]*\.v4\.b32", compiled.asm["ptx"]), "narrow loads"
    return compiled.asm.get("ptx")


def waits_before_it_reads(ptx):
    """Whether a kernel waits for the launch before it, and until then touches no memory."""
    first = re.search(r"griddepcontrol\.wait|(ld|st|atom|red|cp)\.[a-z.]*(global|async)", ptx)
    return first.group() == "griddepcontrol.wait"


def check_end_of_cluster(ptx):
    """A program of many multiprocessors waits for all to have read, and then skips nothing but Triton's own end."""
    events = re.findall(r"ld\.shared::cluster|barrier\.cluster\.\w+(?:\.relaxed)?|st\.global|exit;", ptx)
    leave = events.index("exit;")
    assert events[leave - 2 : leave] == ["barrier.cluster.arrive.relaxed", "barrier.cluster.wait"]
    assert "ld.shared::cluster" in events[:leave]
    assert set(events[leave + 1 :]) <= {"barrier.cluster.arrive", "barrier.cluster.wait"}


def compile_alone(name, types, constants, target, num_ctas=1):
    """A kernel around the rows', which overlaps with the launch before it."""
    kernel = getattr(kernels, name)
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    constants = dict.fromkeys((name for name, kind in signature.items() if kind == "constexpr")) | constants
    options = {"num_warps": 16, "num_ctas": num_ctas, "enable_fp_fusion": False, "launch_pdl": True}
    compiled = triton.compile(ASTSource(kernel, signature, constants | {"OVERLAPPED": True}), target, options)
    assert waits_before_it_reads(compiled.asm["ptx"])


def launches(problem, options, weighted):
    """The three kernels' launches for a problem, each with the pointers that only it takes."""
    compute = POINTERS[problem.compute_dtype]
    rows = {"lse_ptr": compute, "target_sum_ptr": compute, "dloss_ptr": compute, "dlse_ptr": compute}
    dtarget = problem.logits_dtype if problem.soft_targets else None
    yield plan_stats(problem, with_argmax=weighted), {}
    yield plan_grad(problem, dloss_stride=1, dlse_stride=1, dtarget_dtype=dtarget, in_place=False), rows
    yield plan_fused(problem, denominator_stride=0, in_place=weighted), {"denominator_ptr": compute}


count = 0
for target, dtypes in zip(TARGETS, DTYPES, strict=True):
    clusters = target.backend == "cuda" and target.arch >= 90
    for dtype in dtypes:
        # Aligned, with every option and soft targets; unaligned; long enough for clusters, with few rows.
        for n_rows, n, options, soft in (
            (8, 32000, EVERY, True),
            (8, 50257, EVERY, False),
            (8, 151936, PLAIN, False),
        ):
            capped = options.softcap is not None
            problem = Problem(
                n_rows, n, dtype, soft, n, n if soft else 1, n, clusters=clusters, softcap=capped, overlapped=clusters
            )
            for launch, extra in launches(problem, options, options is EVERY):
                compile_launch(launch, problem, options, options is EVERY, extra, target)
                count += 1
# What multiprocessors of a cluster exchange of a row: with the sum of x, and with soft targets.
for target in TARGETS[1:3]:
    for options, soft in ((Options(label_smoothing=0.1), False), (PLAIN, True)):
        n = 151936
        problem = Problem(
            8, n, "bfloat16", soft, n, n if soft else 1, n, clusters=True, label_smoothing=not soft, overlapped=True
        )
        launch = plan_fused(problem, denominator_stride=0, in_place=False)
        assert launch.config.num_ctas > 1
        compile_launch(launch, problem, options, False, {"denominator_ptr": "*fp32"}, target)
        count += 1
# What programs that share rows say of them: with the sum of x, plain between 16-byte boundaries, with soft targets; as
# many of them as a power of two, and not.
for target in TARGETS[:3]:
    for n, options, soft in (
        (128256, Options(label_smoothing=0.1), False),
        (151937, PLAIN, False),
        (151936, PLAIN, True),
    ):
        stride = n if soft else 1
        smoothed = bool(options.label_smoothing)
        problem = Problem(
            1024,
            n,
            "bfloat16",
            soft,
            n,
            stride,
            n,
            shared_rows=True,
            label_smoothing=smoothed,
            overlapped=target.arch > 80,
        )
        launch = plan_fused(problem, denominator_stride=0, in_place=False)
        assert launch.config.steps
        ptx = compile_launch(launch, problem, options, False, {"denominator_ptr": "*fp32"}, target)
        assert len(re.findall(r"atom\.global\.gpu\.relaxed", ptx)) >= 3
        # Whatever orders memory empties L1.
        assert not re.search(r"\.acq|\.release|membar|fence|ld\.volatile", ptx), "an order of memory"
        count += 1
# Rows of soft targets that start between 16-byte boundaries as those of the logits do.
n = 9001
problem = Problem(1024, n, "bfloat16", True, n, n, n, overlapped=True)
for launch, extra in launches(problem, PLAIN, False):
    ptx = compile_launch(launch, problem, PLAIN, False, extra, TARGETS[1])
    assert not re.search(r"ld\.global[^\n]*\.b16", ptx), "loads of one element"
    count += 1
# Tiles: short rows with every option, with soft targets, of odd lengths; classes that lie apart, in groups of rows.
n, inner = 21, 2**16
apart = Problem(8 * inner, n, "bfloat16", False, 1, 1, n, inner, n * inner, 1, n * inner, inner, inner)
for target in TARGETS:
    for problem, options in (
        (Problem(4096, 128, "bfloat16", True, 128, 128, 128), EVERY),
        (Problem(4096, 128, "float32", False, 128, 1, 128), EVERY),
        (Problem(4096, 101, "float64", False, 101, 1, 101), EVERY),
        (apart, PLAIN),
    ):
        if target.backend == "cuda" or problem.logits_dtype == "bfloat16":
            for launch, extra in launches(problem, options, options is EVERY):
                assert launch.config.rows
                compile_launch(launch, problem, options, options is EVERY, extra, target)
                count += 1
n, length = 32000, 511
two_levels = Problem(8, n, "bfloat16", False, n, 1, n, length, (length + 1) * n, n, length * n)
for target in TARGETS[:3]:
    for launch, extra in (
        (plan_stats(two_levels, with_argmax=False), {}),
        (plan_fused(two_levels, denominator_stride=0, in_place=False), {"denominator_ptr": "*fp32"}),
    ):
        compile_launch(launch, two_levels, PLAIN, False, extra, target)
        count += 1
for target in TARGETS[1:3]:
    sums = {"values_ptr": "*fp32", "divisor_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32"}
    compile_alone("mean_kernel", sums, {"SUM_DIVISOR": True, "BLOCK": 4096}, target)
    compile_alone("mean_kernel", sums, {"SUM_DIVISOR": True, "BLOCK": 32768}, target, num_ctas=8)
    labels = {"target_ptr": "*i64", "ignore_index": "i32", "out_ptr": "*fp32", "n": "i32", "n_classes": "i32"}
    compile_alone("divisor_kernel", labels, {"BLOCK": 4096}, target)
    compile_alone("divisor_kernel", labels, {"BLOCK": 32768}, target, num_ctas=8)
    values = {"values_ptr": "*bf16", "scale_ptr": "*fp32", "n": "i32"}
    compile_alone("scale_kernel", values, {"BLOCK": 16384}, target)
    count += 5
print(json.dumps({"compiled": count}))
