"""Rowwise AdamW: equal to AdamW where a row is one number, silent about rows that have no gradient."""

import pytest
import torch

from kernels.rowwise_adamw import RowwiseAdamW, rowwise_adamw_

NUMBERS = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}
SIZES = [(0, 8, 0), (1, 1, 1), (63, 50, 20), (65, 64, 65), (1000, 33, 700), (40, 260, 11)]


def table(num_rows, width, num_touched, dtype=torch.float32, device="cpu"):
    """Return weight, both moments, the touched rows and their gradient."""
    generator = torch.Generator().manual_seed(num_rows + width)
    weight, moment, grad = (
        torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (num_rows, num_rows, num_touched)
    )
    square = torch.rand(num_rows, generator=generator, dtype=torch.float64)
    rows = torch.randperm(num_rows, generator=generator)[:num_touched].sort().values
    state = tuple(x.to(device=device, dtype=dtype) for x in (weight, moment * 0.1, square))
    return state, rows.to(device), grad.to(device=device, dtype=dtype)


def stepped(state, rows, grad, backend, steps=(1, 2, 50)):
    state = tuple(x.clone() for x in state)
    for step in steps:
        rowwise_adamw_(*state, rows, grad, step, **NUMBERS, backend=backend)
    return state


def assert_close(state, expected, tolerance=1e-5):
    for got, want in zip(state, expected, strict=True):
        assert (got.double().cpu() - want).abs().max() <= tolerance * want.abs().max() if want.numel() else True


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("every_row", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_backend_equals_the_reference(size, every_row, backend):
    num_rows, width, num_touched = size
    state, rows, grad = table(num_rows, width, num_rows if every_row else num_touched)
    rows = None if every_row else rows
    expected = stepped([x.double() for x in state], rows, grad.double(), "reference")
    assert_close(stepped(state, rows, grad, backend), expected)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_16_bit_are_taken_as_they_are(dtype, backend):
    state, rows, grad = table(100, 24, 30)
    grad = grad.to(dtype)
    expected = stepped([x.double() for x in state], rows, grad.double(), "reference")
    assert_close(stepped(state, rows, grad, backend), expected)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_rows_that_are_not_touched_keep_every_bit(backend):
    state, rows, grad = table(500, 20, 60)
    untouched = torch.ones(500, dtype=torch.bool).index_fill(0, rows, False)
    for before, after in zip(state, stepped(state, rows, grad, backend), strict=True):
        assert torch.equal(before[untouched], after[untouched])
        assert not torch.isclose(before[rows], after[rows], rtol=1e-7, atol=0.0).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_rows_of_one_number_move_as_adamw_moves_them(dtype, tolerance):
    generator = torch.Generator().manual_seed(3)
    begin = torch.randn(64, 1, generator=generator, dtype=dtype)
    ours, theirs = torch.nn.Parameter(begin.clone()), torch.nn.Parameter(begin.clone())
    pair = (RowwiseAdamW([ours], **NUMBERS), torch.optim.AdamW([theirs], **NUMBERS))
    for _ in range(30):
        gradient = torch.randn(64, 1, generator=generator, dtype=dtype)
        for parameter, optimizer in zip((ours, theirs), pair, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_a_row_of_equal_squares_moves_as_adamw_moves_it():
    """The mean of equal squares is each element's own."""
    begin, signs = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64).sign()
    ours, theirs = torch.nn.Parameter(begin.clone()), torch.nn.Parameter(begin.clone())
    for parameter, make in ((ours, RowwiseAdamW), (theirs, torch.optim.AdamW)):
        optimizer = make([parameter], **NUMBERS)
        for size in (1.0, 0.3, 2.0):
            parameter.grad = size * signs
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def trained(steps, optimizer, embedding, start=0):
    for step in range(start, steps):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, embedding.num_embeddings, (7,), generator=generator)
        optimizer.zero_grad()
        (embedding(ids) * torch.randn(7, embedding.embedding_dim, generator=generator)).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("sparse", [False, True])
def test_a_resumed_run_goes_on_bit_for_bit(sparse, tmp_path):
    torch.manual_seed(0)
    whole = torch.nn.Embedding(30, 6, sparse=sparse)
    halves = torch.nn.Embedding(30, 6, sparse=sparse)
    halves.load_state_dict(whole.state_dict())
    trained(8, RowwiseAdamW(whole.parameters(), **NUMBERS), whole)
    first = RowwiseAdamW(halves.parameters(), **NUMBERS)
    trained(4, first, halves)
    second = RowwiseAdamW(halves.parameters())
    second.load_state_dict(first.state_dict())
    trained(8, second, halves, start=4)
    assert torch.equal(whole.weight, halves.weight)


def test_sparse_gradients_with_repeated_rows_equal_dense_ones_where_they_touch():
    torch.manual_seed(0)
    dense, sparse = torch.nn.Embedding(12, 4), torch.nn.Embedding(12, 4, sparse=True)
    sparse.load_state_dict(dense.state_dict())
    before = dense.weight.detach().clone()
    ids, scale = torch.tensor([3, 3, 0, 9, 3]), torch.randn(5, 4)
    for embedding in (dense, sparse):
        (embedding(ids) * scale).sum().backward()
        RowwiseAdamW(embedding.parameters(), **NUMBERS).step()
    touched = torch.tensor([0, 3, 9])
    torch.testing.assert_close(dense.weight[touched], sparse.weight[touched], rtol=1e-6, atol=1e-7)
    untouched = torch.tensor([i for i in range(12) if i not in touched])
    assert torch.equal(sparse.weight[untouched], before[untouched])
    assert not torch.equal(dense.weight[untouched], before[untouched])


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_zero_gradients_and_zero_moments_move_nothing_and_make_no_nan(backend):
    weight = torch.randn(9, 5)
    before = weight.clone()
    state = (weight, torch.zeros(9, 5), torch.zeros(9))
    rowwise_adamw_(*state, None, torch.zeros(9, 5), 1, lr=0.1, backend=backend)
    assert torch.equal(weight, before)
    assert torch.equal(state[1], torch.zeros(9, 5))


def test_a_row_first_touched_late_steps_as_far_as_the_docstring_says():
    weight = torch.zeros(1, 4, dtype=torch.float64)
    rows, grad = torch.tensor([0]), torch.full((1, 4), 0.7, dtype=torch.float64)
    rowwise_adamw_(weight, torch.zeros_like(weight), weight.new_zeros(1), rows, grad, 10_000, lr=1.0, betas=(0.9, 0.98))
    torch.testing.assert_close(weight, torch.full_like(weight, -0.1 / 0.02**0.5), rtol=1e-6, atol=0.0)


def test_the_optimizer_lowers_a_loss_from_a_closure():
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(20, 8, sparse=True)
    optimizer = RowwiseAdamW(embedding.parameters(), lr=0.05)

    def closure():
        optimizer.zero_grad()
        loss = (embedding(torch.arange(10)) - 1.0).square().mean()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(100)]
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize("rows", [torch.tensor([0, 2, 5]), None], ids=["some rows", "all rows"])
def test_the_op_is_registered_as_torch_expects(rows):
    state, _, _ = table(6, 4, 3)
    grad = torch.randn(6 if rows is None else 3, 4)
    torch.library.opcheck(torch.ops.gr.rowwise_adamw_, (*state, rows, grad, 2, 1e-2, 0.9, 0.98, 1e-8, 0.1, "cpu"))


def test_it_compiles_and_exports_in_one_graph():
    state, rows, grad = table(20, 6, 5)

    def step(weight, exp_avg, exp_avg_sq, rows, grad):
        rowwise_adamw_(weight, exp_avg, exp_avg_sq, rows, grad, 3, **NUMBERS)
        return weight.sum()

    expected = stepped(state, rows, grad, "cpu", steps=(3,))
    compiled = tuple(x.clone() for x in state)
    torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled, rows, grad)
    for got, want in zip(compiled, expected, strict=True):
        assert torch.equal(got, want)

    class Step(torch.nn.Module):
        def forward(self, weight, exp_avg, exp_avg_sq, rows, grad):
            return step(weight, exp_avg, exp_avg_sq, rows, grad)

    exported = torch.export.export(Step(), (*[x.clone() for x in state], rows, grad)).module()
    again = tuple(x.clone() for x in state)
    exported(*again, rows, grad)
    for got, want in zip(again, expected, strict=True):
        assert torch.equal(got, want)


GOOD = {"weight": torch.ones(4, 3), "exp_avg": torch.ones(4, 3), "exp_avg_sq": torch.ones(4)}
GOOD |= {"rows": torch.tensor([0, 2]), "grad": torch.ones(2, 3), "step": 1, "lr": 0.1}
BAD = [
    ({"weight": torch.ones(4, 3, dtype=torch.bfloat16)}, "dtype of weight"),
    ({"weight": torch.ones(3, 4).T}, "stride of weight"),
    ({"weight": torch.ones(4)}, "shape of weight"),
    ({"exp_avg": torch.ones(4, 2)}, "shape of exp_avg"),
    ({"exp_avg_sq": torch.ones(4, 3)}, "shape of exp_avg_sq"),
    ({"rows": torch.tensor([0, 2], dtype=torch.int32)}, "dtype of rows"),
    ({"rows": torch.tensor([2, 0])}, "rows is"),
    ({"rows": torch.tensor([2, 2])}, "rows is"),
    ({"rows": torch.tensor([0, 4])}, "rows is from 0 to 4"),
    ({"rows": torch.tensor([-1, 2])}, "rows is from -1"),
    ({"rows": None}, "shape of grad"),
    ({"grad": torch.ones(3, 3)}, "shape of grad"),
    ({"grad": torch.ones(2, 3, dtype=torch.float64)}, "dtype of grad"),
    ({"step": 0}, "step is 0"),
    ({"lr": -1.0}, "lr is -1"),
    ({"betas": (0.9, 1.0)}, "betas is"),
    ({"eps": 0.0}, "eps is 0"),
    ({"weight_decay": -0.1}, "weight_decay is"),
    ({"backend": "cuda"}, "backend is 'cuda'"),
]


@pytest.mark.parametrize(("wrong", "sentence"), BAD)
def test_bad_input_is_refused_by_name(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        rowwise_adamw_(**{name: x.clone() if torch.is_tensor(x) else x for name, x in GOOD.items()} | wrong)


def test_the_optimizer_refuses_what_is_no_table():
    with pytest.raises(ValueError, match="shape of a parameter"):
        RowwiseAdamW([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="dtype of a parameter"):
        RowwiseAdamW([torch.nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16))])
    with pytest.raises(ValueError, match="eps"):
        RowwiseAdamW([torch.nn.Parameter(torch.ones(3, 2))], eps=0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("every_row", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_gpu_equals_the_reference(size, every_row):
    num_rows, width, num_touched = size
    state, rows, grad = table(num_rows, width, num_rows if every_row else num_touched)
    rows = None if every_row else rows
    expected = stepped([x.double() for x in state], rows, grad.double(), "reference")
    on_gpu = stepped([x.cuda() for x in state], None if rows is None else rows.cuda(), grad.cuda(), "triton")
    assert_close(on_gpu, expected)
