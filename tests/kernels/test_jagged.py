"""Jagged batches joined, split and indexed: bit-equal to the loop over users, values and gradients."""

import pytest
import torch

from kernels.jagged import jagged_concat, jagged_gather, jagged_split, reference

LENGTHS = [
    ([], []),
    ([0], [0]),
    ([1], [0]),
    ([0, 3, 0], [2, 0, 0]),
    ([5, 0, 1, 63], [1, 4, 0, 2]),
    ([1000, 1, 0], [0, 65, 512]),
]


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def batch(lengths_a, lengths_b, width=(3,), dtype=torch.float64):
    """Return a, its offsets, b, its offsets, with gradients wanted."""
    generator = torch.Generator().manual_seed(sum(lengths_a) + len(lengths_b))
    a, b = (
        torch.randn(sum(n), *width, generator=generator, dtype=dtype).requires_grad_() for n in (lengths_a, lengths_b)
    )
    return a, offsets_of(lengths_a), b, offsets_of(lengths_b)


def grads(out, leaves):
    weights = torch.linspace(0.5, 2.0, out.numel(), dtype=out.dtype).view_as(out)
    return torch.autograd.grad((out * weights).sum(), leaves)


@pytest.mark.parametrize("width", [(), (3,), (2, 5)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_concat_equals_the_loop_over_users(lengths, width):
    a, a_offsets, b, b_offsets = batch(*lengths, width)
    values, offsets = jagged_concat(a, a_offsets, b, b_offsets)
    expected, expected_offsets = reference.jagged_concat(a, a_offsets, b, b_offsets)
    assert torch.equal(values, expected)
    assert torch.equal(offsets, expected_offsets)
    for got, want in zip(grads(values, (a, b)), grads(expected, (a, b)), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_split_takes_apart_what_concat_joined(lengths, known):
    a, a_offsets, b, b_offsets = batch(*lengths)
    values = reference.jagged_concat(a, a_offsets, b, b_offsets)[0].detach().requires_grad_()
    got = jagged_split(values, a_offsets, b_offsets, num_a=len(a) if known else None)
    for part, whole, looped in zip(got, (a, b), reference.jagged_split(values, a_offsets, b_offsets), strict=True):
        assert torch.equal(part, whole)
        assert torch.equal(part, looped)
        assert torch.equal(grads(part, values)[0], grads(looped, values)[0])


@pytest.mark.parametrize("positions", [None, [-1, -1, -1], [0, 0, 0], [4, -1, 62], [-5, 0, 7]], ids=str)
def test_gather_equals_the_loop_over_users(positions):
    values = torch.randn(5 + 1 + 63, 2, dtype=torch.float64, requires_grad=True)
    offsets = offsets_of([5, 1, 63])
    places = None if positions is None else torch.tensor(positions)
    got, want = (gather(values, offsets, places) for gather in (jagged_gather, reference.jagged_gather))
    assert torch.equal(got, want)
    assert torch.equal(grads(got, values)[0], grads(want, values)[0])


def test_no_user_gives_no_row():
    assert jagged_gather(torch.ones(0, 4), torch.zeros(1, dtype=torch.int64)).shape == (0, 4)


def test_integers_move_too():
    a, b = torch.tensor([7, 8, 9]), torch.tensor([1])
    values, _ = jagged_concat(a, offsets_of([1, 2]), b, offsets_of([1, 0]))
    assert values.tolist() == [7, 1, 8, 9]


class Join(torch.nn.Module):
    """Joins, reads each user's last row and takes the batch apart again."""

    def forward(self, a, a_offsets, b, b_offsets):
        values, offsets = jagged_concat(a, a_offsets, b, b_offsets)
        last = jagged_gather(values, offsets)
        return last, *jagged_split(values, a_offsets, b_offsets, num_a=a.shape[0])


def test_one_graph_serves_every_length():
    first = batch([2, 5], [1, 3], dtype=torch.float32)
    other = batch([4, 4], [7, 1], dtype=torch.float32)
    compiled = torch.compile(Join(), fullgraph=True, backend="aot_eager", dynamic=True)
    rows = {name: {0: torch.export.Dim.DYNAMIC} for name in ("a", "b")}
    shapes = rows | {"a_offsets": None, "b_offsets": None}
    exported = torch.export.export(Join(), first, dynamic_shapes=shapes).module()
    for inputs in (first, other):
        for got, again, want in zip(compiled(*inputs), exported(*inputs), Join()(*inputs), strict=True):
            assert torch.equal(got, want)
            assert torch.equal(again, want)


A, OFFSETS = torch.ones(3, 2), torch.tensor([0, 1, 3])
BAD = [
    (jagged_concat, (A, torch.tensor([1, 2, 3]), A, OFFSETS), "a_offsets is"),
    (jagged_concat, (A, torch.tensor([0, 2, 4]), A, OFFSETS), "a_offsets is"),
    (jagged_concat, (A, torch.tensor([0, 4, 3]), A, OFFSETS), "a_offsets is"),
    (jagged_concat, (A, OFFSETS.int(), A, OFFSETS), "dtype of a_offsets"),
    (jagged_concat, (A, torch.zeros(0, dtype=torch.int64), A, OFFSETS), "a_offsets is"),
    (jagged_concat, (A, OFFSETS, A, torch.tensor([0, 3])), "shape of b_offsets"),
    (jagged_concat, (A, OFFSETS, torch.ones(3, 4), OFFSETS), "shape of b"),
    (jagged_concat, (A, OFFSETS, A.double(), OFFSETS), "dtype of b"),
    (jagged_split, (A, torch.tensor([0, 1]), torch.tensor([0, 1])), "b_offsets is"),
    (jagged_split, (A, torch.tensor([0, 4]), torch.tensor([0, 0])), "rows of a is 4"),
    (jagged_gather, (A, OFFSETS, torch.tensor([1, 0])), "positions is"),
    (jagged_gather, (A, OFFSETS, torch.tensor([0, -3])), "positions is"),
    (jagged_gather, (A, torch.tensor([0, 0, 3])), "positions is"),
    (jagged_gather, (A, OFFSETS, torch.tensor([0])), "shape of positions"),
]


@pytest.mark.parametrize(("call", "arguments", "sentence"), BAD)
def test_bad_input_is_refused_by_name(call, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_gpu_equals_the_loop_over_users(lengths):
    a, a_offsets, b, b_offsets = (x.detach().cuda() for x in batch(*lengths))
    values, offsets = jagged_concat(a, a_offsets, b, b_offsets)
    assert torch.equal(values, reference.jagged_concat(a, a_offsets, b, b_offsets)[0])
    for got, want in zip(jagged_split(values, a_offsets, b_offsets), (a, b), strict=True):
        assert torch.equal(got, want)
    assert offsets.is_cuda
