"""What each process runs for `tests/test_linear_sharding.py`: `python -m tests.sharded_linear RANK SIZE FILE`."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.functional import linear

from tests.processes import DEVICE, run
from tests.sharded import OPTIONS, N, V, close, make, same_everywhere
from torch_api import (
    LinearCrossEntropyLoss,
    cross_entropy,
    cross_entropy_rows,
    linear_cross_entropy,
    linear_cross_entropy_rows,
)

D = 5


def head():
    """hidden [N, D], weight [V, D], bias [V]: the same on every process."""
    torch.manual_seed(1)
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in ((N, D), (V, D), (V,)))


def own(array, rank, size, axis=0):
    return array.detach().chunk(size, axis)[rank].contiguous().requires_grad_(array.is_floating_point())


def process_group_cases(rank, size):
    """Weights sharded by rows: loss, hidden's gradient whole on every process, weight's and bias's own slices."""
    _, labels, soft, class_weight = make()
    whole = [x.requires_grad_() for x in head()]
    own_weight = class_weight.chunk(size)[rank]
    for implementation in ("reference", "triton"):
        for name, options in OPTIONS.items():
            for reduction in ("mean", "sum", "none") if name == "all" else ("mean",):
                for target in (labels, soft):
                    kind = {"reduction": reduction, **options}
                    expected = cross_entropy(linear(*whole), target, class_weight, **kind)
                    right = torch.autograd.grad(expected.sin().sum(), whole)
                    hidden, weight, bias = own(whole[0], 0, 1), *(own(x, rank, size) for x in whole[1:])
                    part = target if target is labels else target.chunk(size, -1)[rank]
                    kind |= {"implementation": implementation, "process_group": dist.group.WORLD}
                    # Four rows of this slice a chunk: two rows over.
                    budget = 4 * 8 * V // size
                    loss = linear_cross_entropy(hidden, weight, part, bias, own_weight, max_logits_bytes=budget, **kind)
                    close(same_everywhere(loss), expected)
                    grads = torch.autograd.grad(loss.sin().sum(), (hidden, weight, bias))
                    close(same_everywhere(grads[0]), right[0])
                    for got, want in zip(grads[1:], right[1:], strict=True):
                        close(got, want.chunk(size)[rank])


def rows_and_compile(rank, size):
    _, labels, _, _ = make()
    whole = [x.requires_grad_() for x in head()]
    expected = cross_entropy_rows(linear(*whole), labels)
    right = torch.autograd.grad((expected.lse.square() + expected.loss).sum(), whole)
    hidden, weight, bias = own(whole[0], 0, 1), *(own(x, rank, size) for x in whole[1:])
    options = {"process_group": dist.group.WORLD, "max_logits_bytes": 4 * 8 * V // size}

    def rows(hidden, weight, bias):
        return linear_cross_entropy_rows(hidden, weight, labels, bias, **options)

    for function in (rows, torch.compile(rows, fullgraph=True, backend="aot_eager")):
        found = function(hidden, weight, bias)
        for got, want in zip(found, expected, strict=True):
            close(same_everywhere(got), want)
        grads = torch.autograd.grad((found.lse.square() + found.loss).sum(), (hidden, weight, bias))
        close(grads[0], right[0])
        close(grads[1], right[1].chunk(size)[rank])
    criterion = LinearCrossEntropyLoss(max_logits_bytes=options["max_logits_bytes"])
    loss = criterion(hidden, weight, labels, bias, process_group=dist.group.WORLD)
    close(loss, cross_entropy(linear(*whole), labels))
    (first,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="got forward mode or a second derivative of a sharded"):
        torch.autograd.grad(first.sum(), hidden)


class Model(nn.Module):
    """A body and a head whose logits nobody sees."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, D), nn.Linear(D, V)

    def forward(self, x, labels, tokens):
        return linear_cross_entropy(self.body(x), self.head.weight, labels, self.head.bias, denominator=tokens)


def fsdp(rank, size):
    """FSDP2: parameters are gathered around the forward that holds the loss; each process has its own rows."""
    torch.manual_seed(0)
    model = Model()
    x, labels = torch.randn(size, N, 8), make()[1].expand(size, N).clone()
    labels[0, 3:] = -100
    tokens = (labels != -100).sum()
    whole = model(x.flatten(0, 1), labels.flatten(), tokens)
    expected = torch.autograd.grad(whole, list(model.parameters()))
    fully_shard(model, mesh=init_device_mesh(DEVICE, (size,)))
    # FSDP averages gradients over processes.
    (model(x[rank], labels[rank], tokens) * size).backward()
    for parameter, right in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), right)


def dtensors_are_explained(rank, size):
    hidden, weight, _ = head()
    sharded = distribute_tensor(weight, init_device_mesh(DEVICE, (size,)), [Shard(0)])
    labels = make()[1]
    with pytest.raises(
        TypeError, match=r"got weight of type DTensor with plain hidden; .*; write .*from_local\(hidden"
    ):
        linear_cross_entropy(hidden, sharded, labels)
    # What it says to write, where every process has rows of its own.
    leaf, whole = sharded.detach().requires_grad_(), weight.detach().requires_grad_()
    linear_cross_entropy(hidden, whole, labels).backward()
    own_hidden, own_labels = (
        DTensor.from_local(x.chunk(size)[rank], sharded.device_mesh, [Shard(0)]) for x in (hidden, labels)
    )
    linear_cross_entropy(own_hidden, leaf, own_labels).backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.full_tensor(), whole.grad)
    # A plain weight is the same on every process, and its gradient too.
    plain = weight.detach().requires_grad_()
    linear_cross_entropy(own_hidden, plain, own_labels).backward()
    torch.testing.assert_close(plain.grad, whole.grad)


def dtensor_heads(rank, size):
    """Rows and classes over both dimensions of a mesh, with gradients placed as what they are gradients of."""
    torch.manual_seed(2)
    shapes = ((4, N, D), (V, D), (V,))
    whole = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    labels, soft = torch.randint(0, V, (4, N)), torch.randn(4, N, V).double().softmax(-1)
    labels[0, 1:4] = -100
    class_weight = make()[3]
    mesh = init_device_mesh(DEVICE, (2, size // 2), mesh_dim_names=("data", "model"))
    whole_ = Replicate()
    for of_hidden, of_weight in (
        ([Shard(0), whole_], [whole_, whole_]),
        ([Shard(0), whole_], [whole_, Shard(0)]),
        ([Shard(0), whole_], [Shard(0), Shard(1)]),
        ([Shard(0), Shard(1)], [Shard(0), Shard(0)]),
        ([Shard(-1), whole_], [whole_, Shard(0)]),
        ([whole_, whole_], [Shard(0), Shard(0)]),
        ([whole_, whole_], [Shard(0), whole_]),
    ):
        of_bias = [whole_ if p == Shard(1) else p for p in of_weight]
        placements = (of_hidden, of_weight, of_bias)
        arrays = [distribute_tensor(x.detach(), mesh, p) for x, p in zip(whole, placements, strict=True)]
        arrays = [x.requires_grad_() for x in arrays]
        hidden, weight, bias = arrays
        for target, kind in (
            (labels, {"class_weight": class_weight}),
            (labels, {"reduction": "sum", "label_smoothing": 0.1}),
            (labels, {"reduction": "none", "z_loss": 1e-2}),
            (labels, {"denominator": 7.0}),
            (soft, {"class_weight": class_weight, "softcap": 5.0}),
        ):
            options = {name: value for name, value in kind.items() if name != "class_weight"}
            expected = cross_entropy(linear(*whole), target, kind.get("class_weight"), dim=-1, **options)
            right = torch.autograd.grad(expected.sin().sum(), whole)
            loss = linear_cross_entropy(hidden, weight, target, bias, max_logits_bytes=4 * 8 * V, **kind)
            close(loss.full_tensor(), expected)
            grads = torch.autograd.grad(loss.full_tensor().sin().sum(), arrays)
            for got, want, like in zip(grads, right, arrays, strict=True):
                assert got.placements == like.placements
                close(got.full_tensor(), want)
        found = linear_cross_entropy_rows(hidden, weight, labels, bias)
        for got, want in zip(found, cross_entropy_rows(linear(*whole), labels, dim=-1), strict=True):
            assert isinstance(got, DTensor)
            close(got.full_tensor(), want)
    by = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    (right,) = torch.autograd.grad(cross_entropy(linear(*whole), labels, dim=-1, denominator=by), by)
    for of_hidden in ([Shard(0), whole_], [Shard(0), Shard(1)], [whole_, whole_]):
        own_rows = distribute_tensor(whole[0].detach(), mesh, of_hidden)
        loss = linear_cross_entropy(own_rows, weight, labels, bias, denominator=by)
        close(same_everywhere(torch.autograd.grad(loss, by)[0]), right)
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    close(compiled(own_rows, weight, labels, bias).full_tensor(), cross_entropy(linear(*whole), labels, dim=-1))
    with pytest.raises(TypeError, match=r"got weight of type list; required: a torch.Tensor"):
        linear_cross_entropy(hidden, [1], labels)
    with pytest.raises(ValueError, match="got process_group with DTensors"):
        linear_cross_entropy(hidden, weight, labels, process_group=dist.group.WORLD)
    if DEVICE == "cpu":
        # The last process's last label: all of them raise.
        labels[-1, -1] = V
        with pytest.raises(IndexError, match=f"label {V} in labels"):
            linear_cross_entropy(*arrays[:2], distribute_tensor(labels, mesh, [Shard(0), Shard(1)]))
    other = init_device_mesh(DEVICE, (size,))
    with pytest.raises(ValueError, match=r"got weight on .* with hidden on .*; required: one mesh"):
        linear_cross_entropy(hidden, distribute_tensor(whole[1].detach(), other, [whole_]), labels)


CASES = [process_group_cases, rows_and_compile, fsdp, dtensors_are_explained, dtensor_heads]


if __name__ == "__main__":
    run(lambda size: CASES if size == 2 else [dtensor_heads])
