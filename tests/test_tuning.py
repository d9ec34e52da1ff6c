"""Which configurations are chosen: by what a launch is for, as both front ends say it."""

import numpy as np
import pytest

from ce_kernels import Problem, launch, tuning
from tests.conftest import planned_anew
from tests.frontends import FRONTENDS

LONG, MIDDLE, ODD = 128256, 32000, 50257


def chosen(n_classes, in_place=False, **facts):
    n_rows = facts.pop("n_rows", 64)
    problem = Problem(n_rows, n_classes, "bfloat16", facts.pop("soft_targets", False), n_classes, 1, n_classes, **facts)
    return tuning.choose("fused", problem, in_place=in_place)


@pytest.mark.parametrize(
    ("n_classes", "facts", "table"),
    [
        (MIDDLE, {}, "FUSED"),
        (MIDDLE, {"in_place": True}, "FUSED_IN_PLACE"),
        (MIDDLE, {"label_smoothing": True}, "FUSED_SMOOTHED"),
        (ODD, {}, "FUSED_SHIFTED"),
        (ODD, {"label_smoothing": True}, "FUSED_SHIFTED_SMOOTHED"),
        (LONG, {"clusters": True}, "FUSED_CLUSTERS"),
        (LONG, {"clusters": True, "label_smoothing": True}, "FUSED_CLUSTERS_SMOOTHED"),
        (LONG, {"clusters": True, "in_place": True}, "FUSED_CLUSTERS_IN_PLACE"),
        (LONG, {"clusters": True, "in_place": True, "label_smoothing": True}, "FUSED_CLUSTERS_SMOOTHED_IN_PLACE"),
        (LONG, {"clusters": True, "soft_targets": True}, "FUSED_CLUSTERS_SOFT"),
        (MIDDLE, {"soft_targets": True}, "FUSED_SOFT"),
        (MIDDLE + 1, {"soft_targets": True}, "FUSED_SOFT_SHIFTED"),
        (LONG + 1, {"clusters": True, "soft_targets": True}, "FUSED_CLUSTERS_SOFT_SHIFTED"),
        (LONG + 1, {"clusters": True}, "FUSED_CLUSTERS_SHIFTED"),
        (LONG, {"clusters": True, "softcap": True}, "FUSED"),
        (LONG, {"clusters": False}, "FUSED"),
        (LONG, {"n_rows": 133, "shared_rows": True}, "SHARED"),
        (LONG, {"n_rows": 133, "shared_rows": True, "in_place": True}, "SHARED"),
        (LONG, {"n_rows": 133, "shared_rows": True, "softcap": True}, "FUSED"),
        (LONG, {"n_rows": 133, "shared_rows": True, "label_smoothing": True}, "SHARED_SMOOTHED"),
        (LONG, {"n_rows": 133, "shared_rows": True, "soft_targets": True}, "SHARED_SOFT"),
        (LONG + 1, {"n_rows": 133, "shared_rows": True}, "SHARED_SHIFTED"),
        (LONG + 1, {"n_rows": 133, "shared_rows": True, "label_smoothing": True}, "SHARED_SHIFTED"),
        (LONG + 1, {"n_rows": 133, "shared_rows": True, "soft_targets": True}, "SHARED_SOFT_SHIFTED"),
        (ODD, {"n_rows": 133, "shared_rows": True}, "SHARED_SHIFTED"),
        (MIDDLE, {"n_rows": 133, "shared_rows": True}, "FUSED"),
        (MIDDLE, {"n_rows": 133, "shared_rows": True, "label_smoothing": True}, "SHARED_SMOOTHED"),
        (LONG, {"n_rows": 132, "shared_rows": True}, "FUSED"),
        (LONG, {"n_rows": 132, "shared_rows": True, "clusters": True}, "FUSED_CLUSTERS"),
    ],
    ids=str,
)
def test_a_configuration_is_of_the_table_for_what_the_launch_does(n_classes, facts, table, monkeypatch):
    marked = tuning.Config(4096, 4, unroll=7)
    assert chosen(n_classes, **facts).unroll != marked.unroll
    monkeypatch.setattr(tuning, table, ((None, marked),))
    assert chosen(n_classes, **facts).unroll == marked.unroll


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("n_classes", [40961, 49152, 49153, 128256, 262145, 2**20, 3 * 2**21 + 1])
def test_parts_of_whole_steps_cover_a_row(n_classes, dtype):
    """By as many programs as there are parts, up to as many as find room together."""
    problem = Problem(1000, n_classes, dtype, False, n_classes, 1, n_classes, shared_rows=True)
    plan = launch.plan_fused(problem, denominator_stride=0, in_place=False)
    constants = dict(plan.constants)
    programs, part = constants["PROGRAMS"], constants["SLICE"]
    positions = n_classes + (problem.group - 1 if problem.shifted else 0)
    assert 2 <= programs <= launch.SHARED_BY
    assert part % plan.config.block == 0
    assert (programs - 1) * part < positions <= programs * part
    assert plan.grid == (1000 * programs,)
    assert plan.outputs[-1] == launch.Output("exchange_ptr", (1000, programs, 2), "int32", zeroed=True)


@pytest.mark.parametrize("frontend", [one for one in FRONTENDS if "reference" not in one.id])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"softcap": 5.0}], ids=str)
def test_front_ends_say_which_options_are_on(frontend, options, monkeypatch):
    seen, choose = [], tuning.choose

    def record(kernel, problem, **more):
        seen.append({"label_smoothing": problem.label_smoothing, "softcap": problem.softcap})
        return choose(kernel, problem, **more)

    monkeypatch.setattr(tuning, "choose", record)
    logits, labels = frontend.array(np.zeros((3, 300), np.float32)), frontend.array(np.arange(3))
    with planned_anew():
        frontend.api.cross_entropy(logits, labels, implementation="triton", **options)
    on = {"label_smoothing": False, "softcap": False} | dict.fromkeys(options, True)
    assert seen
    assert all(one == on for one in seen)


@pytest.mark.parametrize(
    ("version", "plain", "spread"), [((3, 7), False, False), ((3, 8), True, False), ((3, 9), True, True)], ids=str
)
def test_clusters_are_for_who_compiles_them(version, plain, spread, monkeypatch):
    monkeypatch.setattr(launch, "_triton_version", lambda: version)
    assert launch.has_clusters(90, spread=False) is plain
    assert launch.has_clusters(90, spread=True) is spread
    assert not launch.has_clusters(80, spread=False)
