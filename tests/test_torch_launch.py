"""What is launched again without Triton's search: that, and only that, which was compiled for such arguments."""

import pytest
import torch

from torch_api import launch


class Compiled:
    """Stands for what Triton compiled."""

    def __init__(self, calls, name):
        self.calls, self.name = calls, name

    def __getitem__(self, grid):
        return lambda *arguments: self.calls.append((self.name, grid, arguments))


class Source:
    """Stands for a kernel: compiles in its first call of every kind, and says so."""

    def __init__(self, calls, result=Compiled):
        self.calls, self.result = calls, result

    def __getitem__(self, grid):
        def first(*arguments, **options):
            self.calls.append(("search", grid, arguments))
            return self.result(self.calls, "known")

        return first


@pytest.fixture
def calls(monkeypatch):
    calls = []
    source = Source(calls)
    monkeypatch.setattr(launch, "kernel", lambda name: source)
    return calls


def alone(*arguments, constants=(8,), **options):
    launch.run_alone("mean_kernel", 1, arguments, constants, **{"num_warps": 4} | options)


def test_the_same_kind_of_arguments_is_searched_for_once(calls):
    for n in (48, 64, 96):
        alone(torch.zeros(n), None, n)
    assert [name for name, *_ in calls] == ["search", "known", "known"]
    assert calls[-1][1] == (1, 1, 1)
    assert calls[-1][2][1:] == (None, 96, 8, False)


MEMORY = torch.zeros(64)


@pytest.mark.parametrize(
    ("arguments", "changed"),
    {
        "dtype": ((MEMORY.double(), None, 48), {}),
        "alignment": ((MEMORY[1:], None, 48), {}),
        "a pointer for None": ((MEMORY, MEMORY, 48), {}),
        "an integer of 1": ((MEMORY, None, 1), {}),
        "an integer not divisible by 16": ((MEMORY, None, 49), {}),
        "a long integer": ((MEMORY, None, 2**31), {}),
        "constants": ((MEMORY, None, 48), {"constants": (16,)}),
        "warps": ((MEMORY, None, 48), {"num_warps": 8}),
        "multiprocessors": ((MEMORY, None, 48), {"num_ctas": 8}),
    }.values(),
)
def test_another_kind_of_arguments_is_searched_for(calls, arguments, changed):
    alone(MEMORY, None, 48)
    alone(*arguments, **changed)
    assert [name for name, *_ in calls] == ["search", "search"]


def test_another_kernel_is_searched_for(calls, monkeypatch):
    alone(MEMORY, None, 48)
    other = Source(calls)
    monkeypatch.setattr(launch, "kernel", lambda name: other)
    alone(MEMORY, None, 48)
    assert [name for name, *_ in calls] == ["search", "search"]


@pytest.mark.parametrize("result", [lambda *_: None, lambda *_: object()], ids=["interpreter", "being compiled"])
def test_what_cannot_be_launched_is_not_remembered(calls, monkeypatch, result):
    source = Source(calls, result)
    monkeypatch.setattr(launch, "kernel", lambda name: source)
    for _ in range(2):
        alone(MEMORY, None, 48)
    assert [name for name, *_ in calls] == ["search", "search"]
