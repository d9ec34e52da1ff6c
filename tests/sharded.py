"""What each process of `tests/test_torch_distributed.py` runs: `python -m tests.sharded RANK SIZE FILE`."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from tests.cases import ALL
from tests.processes import DEVICE, run
from torch_api import CrossEntropyLoss, cross_entropy, cross_entropy_rows

N, V = 6, 24
OPTIONS = {"plain": {}, "smoothing": {"label_smoothing": 0.1}, "z_loss": {"z_loss": 1e-2}, "all": ALL}


def make(dtype=torch.float64):
    """Logits [N, V], labels with ignored ones, soft targets, class weights: the same on every process."""
    torch.manual_seed(0)
    labels = torch.randint(0, V, (N,))
    labels[1] = -100
    logits = torch.randn(N, V, dtype=torch.float64) * 3
    return logits.to(dtype), labels, torch.rand(N, V).double().softmax(-1), torch.rand(V).double() + 0.5


def own(array, rank, size):
    return array.chunk(size, -1)[rank].contiguous()


def same_everywhere(value):
    """The value, after checking that every process has the same bits."""
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value.detach().contiguous())
    assert all(torch.equal(part.nan_to_num(7.0), parts[0].nan_to_num(7.0)) for part in parts), parts
    return value


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **({"rtol": 1e-9, "atol": 1e-12} | tolerance), equal_nan=True)


def process_group_cases(rank, size):
    group = dist.group.WORLD
    logits, labels, soft, weight = make()
    for implementation in ("reference", "triton"):
        for name, options in OPTIONS.items() if implementation == "reference" else [("all", ALL)]:
            for target in (labels, soft):
                for w in (None, weight) if implementation == "reference" else (weight,):
                    for reduction in ("mean", "sum", "none") if name == "all" else ("mean",):
                        kind = {"reduction": reduction, "implementation": implementation, **options}
                        leaf, t_leaf = logits.clone().requires_grad_(), target.clone()
                        inputs = [leaf] if target is labels else [leaf, t_leaf.requires_grad_()]
                        expected = cross_entropy(leaf, t_leaf, w, **{**kind, "implementation": "reference"})
                        right = torch.autograd.grad(expected.sin().sum(), inputs)
                        part = own(logits, rank, size).requires_grad_()
                        t = target if target is labels else own(target, rank, size).requires_grad_()
                        loss = cross_entropy(
                            part, t, None if w is None else own(w, rank, size), process_group=group, **kind
                        )
                        close(same_everywhere(loss), expected)
                        grads = torch.autograd.grad(loss.sin().sum(), [part] if target is labels else [part, t])
                        for got, want in zip(grads, right, strict=True):
                            close(got, own(want, rank, size))


def rows_and_donation(rank, size):
    group = dist.group.WORLD
    logits, labels, _, _ = make()
    logits[2, [5, V - 1]] = 50.0  # equals, on different processes
    for scale in (1.0, -0.5, 0.0):
        leaf, part = logits.clone().requires_grad_(), own(logits, rank, size).requires_grad_()
        expected = cross_entropy_rows(leaf, labels, logit_scale=scale)
        rows = cross_entropy_rows(part, labels, logit_scale=scale, process_group=group)
        for got, want in zip(rows, expected, strict=True):
            close(same_everywhere(got), want)
        (right,) = torch.autograd.grad((expected.lse.square() + expected.loss).sum(), leaf)
        close(torch.autograd.grad((rows.lse.square() + rows.loss).sum(), part)[0], own(right, rank, size))
    part = own(logits, rank, size).requires_grad_()
    local = part * 1
    loss = cross_entropy(local, labels, process_group=group, denominator=torch.tensor(5), donate_logits=True)
    gradient = torch.autograd.grad(loss, local)[0]
    assert gradient.data_ptr() == local.data_ptr()
    leaf = logits.clone().requires_grad_()
    close(gradient, own(torch.autograd.grad(cross_entropy(leaf, labels), leaf)[0], rank, size))


def special_rows(rank, size):
    """Masked slices, masked labels, rows of only −inf, invalid labels, all ignored, no rows: as without sharding."""
    group = dist.group.WORLD
    for implementation in ("reference", "triton"):
        for smoothing in (0.0, 0.1):
            logits, labels, _, _ = make(torch.float32)
            labels[:] = torch.tensor([1, V - 1, 0, -100, 3, 5])
            logits[0, V // 2 :] = -torch.inf  # some slices are masked as a whole
            logits[1, V // size :] = -torch.inf  # and the label's slice is one of them
            logits[2] = -torch.inf
            logits[3] = torch.nan
            options = {"reduction": "none", "label_smoothing": smoothing, "implementation": implementation}
            leaf, part = logits.clone().requires_grad_(), own(logits, rank, size).requires_grad_()
            expected = cross_entropy(leaf, labels, **options)
            assert smoothing or expected[1] == torch.inf
            loss = cross_entropy(part, labels, process_group=group, **options)
            close(same_everywhere(loss), expected, rtol=1e-5, atol=1e-5)
            g = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 0.5])
            (right,), (got,) = torch.autograd.grad(expected, leaf, g), torch.autograd.grad(loss, part, g)
            close(got, own(right, rank, size), rtol=1e-4, atol=1e-6)
    confident = torch.full((1, V), 900.0)
    confident[0, 5] = 915.0
    label = torch.tensor([5])
    expected = cross_entropy(confident, label)
    # lse alone, near 915, would round this loss away.
    close(cross_entropy(own(confident, rank, size), label, process_group=group), expected, rtol=0.0, atol=1e-6)
    all_ignored = torch.full((N,), -100)
    assert cross_entropy(own(logits, rank, size), all_ignored, process_group=group).isnan()
    assert cross_entropy(own(logits, rank, size), all_ignored, process_group=group, denominator=3.0) == 0
    assert cross_entropy(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long), process_group=group).isnan()


def mistakes(rank, size):
    group = dist.group.WORLD
    logits, labels, _, weight = make()
    part = own(logits, rank, size).requires_grad_()
    expect(IndexError, f"label {V} in target", lambda: cross_entropy(part, labels.clamp(min=V), process_group=group))
    uneven = torch.zeros(N, 3 + rank)
    expect(ValueError, "vocabulary slices of", lambda: cross_entropy(uneven, labels.clamp(0, 2), process_group=group))
    loss = cross_entropy(part, labels, process_group=group)
    second = lambda: torch.autograd.grad(loss, part, create_graph=True)  # noqa: E731
    expect(RuntimeError, "create_graph=True with a DTensor or a sharded vocabulary", second)
    loss_of = lambda x: cross_entropy(x, labels, process_group=group)  # noqa: E731
    expect(RuntimeError, "got torch.func, forward mode", lambda: torch.func.grad(loss_of)(part.detach()))
    w = own(weight, rank, size).requires_grad_()
    expect(RuntimeError, "gradient of class weights", lambda: cross_entropy(part, labels, w, process_group=group))
    mesh = init_device_mesh(DEVICE, (size,))
    whole = distribute_tensor(logits, mesh, [Shard(1)])
    expect(ValueError, "process_group with a DTensor", lambda: cross_entropy(whole, labels, process_group=group))
    few = distribute_tensor(logits[:, : size - 1], mesh, [Shard(1)])
    expect(ValueError, "some of which hold none", lambda: cross_entropy(few, labels.clamp(max=0)))
    donated = lambda: cross_entropy(whole, labels, donate_logits=True)  # noqa: E731
    expect(ValueError, "donate_logits=True with a DTensor", donated)
    for placement in (Replicate(), Shard(0), Shard(1)):
        written = distribute_tensor(logits, mesh, [placement]).requires_grad_() * 1
        loss = cross_entropy(written, labels)
        written.mul_(0.0)
        expect(RuntimeError, "a DTensor that was written to after the loss", loss.backward)


def expect(kind, text, call):
    with pytest.raises(kind, match=text):
        call()


def layouts(size):
    """(mesh shape, placements of logits [2, 3, V], of labels or None for plain ones)."""
    flat = [
        ((size,), [Shard(2)], None),
        ((size,), [Shard(-1)], [Replicate()]),
        ((size,), [Shard(0)], [Shard(0)]),
        ((size,), [Shard(1)], None),
        ((size,), [Replicate()], None),
    ]
    grid = [
        ((2, 2), [Shard(0), Shard(2)], [Shard(0), Replicate()]),
        ((2, 2), [Shard(2), Shard(1)], None),
        ((2, 2), [Shard(2), Shard(2)], None),
    ]
    return flat + (grid if size == 4 else [])


def dtensor_cases(rank, size):
    for n_classes in (V, 23):
        for mesh_shape, placements, label_placements in layouts(size):
            mesh = init_device_mesh(DEVICE, mesh_shape)
            logits, labels, soft, weight = make()
            x, y = logits[:, :n_classes].reshape(2, 3, n_classes), labels.clamp(max=n_classes - 1).reshape(2, 3)
            soft, weight = soft[:, :n_classes].reshape(2, 3, n_classes), weight[:n_classes]
            for target in (y, soft):
                for reduction in ("mean", "sum", "none"):
                    kind = {"dim": -1, "reduction": reduction, **ALL}
                    leaf = x.clone().requires_grad_()
                    expected = cross_entropy(leaf, target, weight, **kind)
                    (right,) = torch.autograd.grad(expected.sin().sum(), leaf)
                    part = distribute_tensor(x, mesh, placements).requires_grad_()
                    t = target
                    if label_placements is not None and target is y:
                        t = distribute_tensor(target, mesh, label_placements)
                    loss = cross_entropy(part, t, weight, **kind)
                    close(same_everywhere(loss.full_tensor()), expected)
                    (got,) = torch.autograd.grad(loss.sin().sum(), part)
                    assert got.placements == part.placements, (got.placements, part.placements)
                    close(got.full_tensor(), right)
            rows = cross_entropy_rows(distribute_tensor(x, mesh, placements), y, dim=-1)
            for got, want in zip(rows, cross_entropy_rows(x, y, dim=-1), strict=True):
                close(got.full_tensor(), want)
    mesh = init_device_mesh(DEVICE, (size,))
    logits, labels, _, _ = make()
    partial = DTensor.from_local(logits / size, mesh, [Partial()])
    close(cross_entropy(partial, labels, denominator=4.0).full_tensor(), cross_entropy(logits, labels, denominator=4.0))


def tensor_parallel_head(rank, size):
    """A head whose output stays sharded on the classes, as `loss_parallel` has it, and nothing is gathered."""
    torch.manual_seed(0)
    model = nn.Linear(8, V, bias=False).double()
    hidden, labels = torch.randn(N, 8).double(), make()[1]
    expected = torch.autograd.grad(F.cross_entropy(model(hidden), labels), model.weight)[0]
    mesh = init_device_mesh(DEVICE, (size,))
    parallelize_module(model, mesh, ColwiseParallel(use_local_output=False))
    logits = model(hidden)
    with CommDebugMode() as communication:
        loss = cross_entropy(logits, labels)
        loss.backward()
    assert communication.get_total_counts() == 1, communication.get_comm_counts()
    close(model.weight.grad.full_tensor(), expected)
    local = nn.Linear(8, V // size, bias=False).double()
    local.weight = nn.Parameter(model.weight.to_local().detach().clone())
    CrossEntropyLoss()(local(hidden), labels, process_group=dist.group.WORLD).backward()
    close(local.weight.grad, expected.chunk(size)[rank])


def fsdp(rank, size):
    """FSDP2: parameters sharded, each process its own rows, one global token count."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, V))
    hidden, labels = torch.randn(size, N, 8), make()[1].expand(size, N).clone()
    labels[0, 3:] = -100
    whole = F.cross_entropy(model(hidden).flatten(0, 1), labels.flatten())
    expected = torch.autograd.grad(whole, list(model.parameters()))
    mesh = init_device_mesh(DEVICE, (size,))
    for layer in (*model, model):
        fully_shard(layer, mesh=mesh)
    tokens = (labels != -100).sum()
    loss = cross_entropy(model(hidden[rank]), labels[rank], denominator=tokens)
    # FSDP averages gradients over processes.
    (loss * size).backward()
    for parameter, right in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), right)


def compiled(rank, size):
    logits, labels, _, _ = make(torch.float32)
    part = own(logits, rank, size).requires_grad_()
    step = lambda x: cross_entropy(x * 2, labels, process_group=dist.group.WORLD, **ALL)  # noqa: E731
    program = torch.compile(step, fullgraph=True, backend="aot_eager")
    close(torch.autograd.grad(program(part), part), torch.autograd.grad(step(part), part), rtol=1e-5, atol=1e-7)


CASES = [
    process_group_cases,
    rows_and_donation,
    special_rows,
    mistakes,
    dtensor_cases,
    tensor_parallel_head,
    fsdp,
    compiled,
]


if __name__ == "__main__":
    # Labels out of range raise on CPUs alone.
    run(lambda size: [case for case in CASES if DEVICE == "cpu" or case is not mistakes])
