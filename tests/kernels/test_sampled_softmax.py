"""Softmax losses: every backend against the plain one in fp64, forward and every gradient."""

import pytest
import torch
from torch.nn import functional as F

from kernels.dispatch import interpreted
from kernels.sampled_softmax import bench, cpu, full_softmax, sampled_softmax

TEMPERATURE = 0.05
BACKENDS = ["cpu", "triton"]
KINDS = ["own", "shared", "full"]
# Tokens, items, width, negatives: nothing, one, odd, a block and one more, many tokens.
SHAPES = [(0, 5, 8, 3), (1, 1, 1, 1), (63, 40, 50, 7), (65, 129, 33, 65), (70, 7, 20, 0), (1000, 90, 17, 63)]


def make_inputs(tokens, items, width, negatives, *, kind="own", dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def unit(rows):
        x = F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1)
        return x.to(device, dtype).requires_grad_()

    def ids(*shape):
        return torch.randint(0, items, shape, generator=generator).to(device)

    drawn = {"own": (tokens, negatives), "shared": (negatives,), "full": (0,)}[kind]
    grad = torch.randn(tokens, generator=generator, dtype=torch.float64).to(device)
    return unit(tokens), unit(items), ids(tokens), ids(*drawn), grad


def losses_of(kind, users, items, targets, negatives, backend):
    if kind == "full":
        return full_softmax(users, items, targets, TEMPERATURE, backend=backend)
    return sampled_softmax(users, items, targets, negatives, TEMPERATURE, backend=backend)


def run(kind, inputs, backend):
    """Return the losses and the gradients of users and items."""
    users, items, targets, negatives, grad = inputs
    losses = losses_of(kind, users, items, targets, negatives, backend)
    return [losses.detach(), *torch.autograd.grad(losses, (users, items), grad.to(losses.dtype))]


def truth(kind, inputs):
    users, items, *rest = inputs
    exact = [x.detach().double().requires_grad_() for x in (users, items)]
    return run(kind, [*exact, *rest], "reference")


def assert_close(got, expected, tolerance=1e-5):
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert not b.numel() or (a.double() - b).abs().max() <= tolerance * max(b.abs().max().item(), 1e-3)


def rms_ratio(a, b):
    return ((a.double() - b).square().mean() / b.square().mean()).sqrt().item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_backends_equal_the_reference_forward_and_every_gradient(shape, kind, backend, poisoned_empty, monkeypatch):
    # Both ways over shared negatives: the full softmax keeps nothing, as over a catalogue.
    monkeypatch.setattr(cpu, "MAX_KEPT", 0 if kind == "full" else 1024)
    inputs = make_inputs(*shape, kind=kind)
    assert_close(run(kind, inputs, backend), truth(kind, inputs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_stays_within_its_rounding_and_gives_fp32_losses(kind, backend, poisoned_empty):
    inputs = make_inputs(65, 70, 50, 40, kind=kind, dtype=torch.float16)
    got = run(kind, inputs, backend)
    assert [x.dtype for x in got] == [torch.float32, torch.float16, torch.float16]
    assert all(rms_ratio(a, b) <= 5e-3 for a, b in zip(got, truth(kind, inputs), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_works_and_keeps_its_dtype(kind):
    inputs = make_inputs(65, 70, 50, 40, kind=kind, dtype=torch.bfloat16)
    for backend in BACKENDS:
        got = run(kind, inputs, backend)
        assert [x.dtype for x in got] == [torch.float32, torch.bfloat16, torch.bfloat16]
        assert all(rms_ratio(a, b) <= 1e-2 for a, b in zip(got, truth(kind, inputs), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_kept", [0, 1024])
def test_cpu_gradients_are_derivatives_in_fp64(kind, max_kept, monkeypatch):
    monkeypatch.setattr(cpu, "MAX_KEPT", max_kept)
    users, items, targets, negatives, _ = make_inputs(5, 6, 4, 7, kind=kind, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda u, i: losses_of(kind, u, i, targets, negatives, "cpu"), (users, items))


@pytest.mark.parametrize("kind", ["own", "shared"])
def test_tiles_and_chunks_do_not_show_in_the_result(kind, monkeypatch):
    inputs = make_inputs(300, 50, 12, 70, kind=kind, dtype=torch.float64)
    whole = run(kind, inputs, "cpu")
    for name, size in (("MAX_KEPT", 10), ("TILE_LOGITS", 80), ("TILE_ITEMS", 11), ("CHUNK_PAIRS", 500)):
        monkeypatch.setattr(cpu, name, size)
    assert_close(run(kind, inputs, "cpu"), whole, 1e-13)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_accidental_hits_are_masked_and_repeated_negatives_count_twice(backend):
    users = torch.tensor([[1.0, 0.0]])
    items = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    targets = torch.tensor([0])
    for shape in ((5,), (1, 5)):
        negatives = torch.tensor([0, 1, 2, 2, 0]).view(shape)
        expected = torch.tensor([1.0, 0.0, 0.6, 0.6]).logsumexp(0) - 1.0
        got = sampled_softmax(users, items, targets, negatives, 1.0, backend=backend)
        assert got.item() == pytest.approx(expected.item(), rel=1e-6)
        only_hits = torch.zeros(shape, dtype=torch.int64)
        assert sampled_softmax(users, items, targets, only_hits, 1.0, backend=backend).item() == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_full_softmax_is_cross_entropy_from_first_item_on(backend):
    users, items, targets, _, grad = make_inputs(65, 70, 9, 0, kind="full")
    targets = targets.clamp(min=5)
    losses = full_softmax(users, items, targets, TEMPERATURE, first_item=5, backend=backend)
    got = [losses, *torch.autograd.grad(losses, (users, items), grad.float())]
    exact = [x.detach().double().requires_grad_() for x in (users, items)]
    logits = exact[0] @ exact[1][5:].T / TEMPERATURE
    expected = F.cross_entropy(logits, targets - 5, reduction="none")
    assert_close(got, [expected, *torch.autograd.grad(expected, exact, grad)])
    assert not got[2][:5].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["own", "shared"])
def test_the_order_of_the_negatives_does_not_matter_and_runs_repeat_bit_for_bit(kind, backend):
    users, items, targets, negatives, grad = make_inputs(64, 90, 17, 63, kind=kind)
    first = run(kind, (users, items, targets, negatives, grad), backend)
    again = run(kind, (users, items, targets, negatives, grad), backend)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    shuffled = negatives[..., torch.randperm(63, generator=torch.Generator().manual_seed(1))]
    assert_close(run(kind, (users, items, targets, shuffled, grad), backend), [x.double() for x in first])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["own", "shared"])
def test_logits_far_apart_neither_overflow_nor_vanish(kind, backend):
    users, items, targets, negatives, grad = make_inputs(64, 90, 17, 63, kind=kind)
    inputs = [x.detach().mul(20).requires_grad_() for x in (users, items)] + [targets, negatives, grad]
    got = run(kind, inputs, backend)
    assert all(x.isfinite().all() for x in got)
    assert got[0].max() > 1000
    assert_close(got[:1], truth(kind, inputs)[:1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_expanded_arguments_are_read_as_they_are(backend):
    users, items, targets, negatives, grad = make_inputs(40, 30, 12, 6)
    twice = (torch.stack([x.detach()] * 2, dim=1).view(-1, 12)[::2].requires_grad_() for x in (users, items))
    others = targets, negatives[:1].expand(40, 6), grad[:1].expand(40)
    inputs = [*twice, *others]
    assert_close(run("own", inputs, backend), truth("own", inputs))


@pytest.mark.parametrize("kind", ["own", "shared"])
def test_ids_outside_the_table_give_nan_where_they_cannot_be_refused(kind):
    users, items, targets, negatives, _ = make_inputs(20, 30, 12, 6, kind=kind)
    targets[3], targets[5] = 30, -1
    losses = losses_of(kind, users, items, targets, negatives, "triton")
    assert losses.isnan().nonzero().flatten().tolist() == [3, 5]
    negatives.view(-1)[0] = 10**12
    losses = losses_of(kind, users, items, targets, negatives, "triton")
    assert losses.isnan().nonzero().flatten().tolist() == ([0, 3, 5] if kind == "own" else list(range(20)))


@pytest.mark.parametrize("kind", ["own", "shared"])
def test_the_op_passes_opcheck(kind):
    users, items, targets, negatives, _ = make_inputs(9, 7, 5, 4, kind=kind)
    torch.library.opcheck(torch.ops.gr.sampled_softmax.default, (users, items, targets, negatives, 0.05, 0, "cpu"))
    losses, kept = torch.ops.gr.sampled_softmax(users, items, targets, negatives, 0.05, 0, "cpu")
    arguments = (losses.detach(), users.detach(), items.detach(), targets, negatives, kept.detach(), 0.05, "cpu")
    torch.library.opcheck(torch.ops.gr.sampled_softmax_backward.default, arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_the_op_compiles_in_one_graph_and_exports(kind):
    users, items, targets, negatives, _ = make_inputs(9, 7, 5, 4, kind=kind)

    class Loss(torch.nn.Module):
        def forward(self, users, items, targets, negatives):
            return losses_of(kind, users, items, targets, negatives, None).mean()

    arguments = users, items, targets, negatives
    expected = torch.autograd.grad(Loss()(*arguments), (users, items))
    compiled = torch.compile(Loss(), fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*arguments), (users, items))
    assert_close(got, [x.double() for x in expected], 1e-6)
    exported = torch.export.export(Loss(), arguments)
    assert any("gr.sampled_softmax" in str(node.target) for node in exported.graph.nodes)
    assert torch.equal(exported.module()(*arguments), Loss()(*arguments))


BAD = {
    "users": [{"users": torch.zeros(4)}, {"users": torch.zeros(4, 3, dtype=torch.int64)}, {"users": torch.zeros(4, 0)}],
    "items": [{"items": torch.zeros(5, 2)}, {"items": torch.zeros(5, 3).double()}, {"items": torch.zeros(0, 3)}],
    "targets": [
        {"targets": torch.zeros(3, dtype=torch.int64)},
        {"targets": torch.zeros(4, dtype=torch.int32)},
        {"targets": torch.tensor([0, 1, 2, 5])},
        {"targets": torch.tensor([0, 1, 2, -1])},
        {"targets": torch.zeros(8, dtype=torch.int64)[::2]},
        {"targets": torch.zeros(4, dtype=torch.int64, device="meta")},
    ],
    "negatives": [
        {"negatives": torch.zeros(3, 2, dtype=torch.int64)},
        {"negatives": torch.zeros(4, 2)},
        {"negatives": torch.zeros(4, 2, 1, dtype=torch.int64)},
        {"negatives": torch.tensor([5])},
        {"negatives": torch.full((4, 2), -1)},
    ],
    "temperature": [{"temperature": value} for value in (0.0, -1.0, float("nan"), float("inf"))],
    "backend": [{"backend": "gpu"}],
}


@pytest.mark.parametrize(("argument", "changes"), [(name, change) for name, many in BAD.items() for change in many])
def test_bad_input_is_refused_by_name(argument, changes):
    good = {
        "users": torch.zeros(4, 3),
        "items": torch.zeros(5, 3),
        "targets": torch.zeros(4, dtype=torch.int64),
        "negatives": torch.zeros(4, 2, dtype=torch.int64),
        "temperature": 0.1,
    }
    for backend in ("cpu", "reference"):
        with pytest.raises(ValueError, match=argument):
            sampled_softmax(**(good | {"backend": backend} | changes))
    if argument != "negatives":
        del good["negatives"]
        with pytest.raises(ValueError, match=argument):
            full_softmax(**(good | changes))


def test_what_only_one_way_in_takes_is_refused_elsewhere():
    users, items, targets, negatives, _ = make_inputs(4, 5, 3, 2)
    for first_item in (-1, 5):
        with pytest.raises(ValueError, match="first_item"):
            full_softmax(users, items, targets, 0.1, first_item=first_item)
    with pytest.raises(ValueError, match="targets"):
        full_softmax(users, items, torch.tensor([3, 3, 3, 2]), 0.1, first_item=3)
    with pytest.raises(ValueError, match="dtype of users"):
        sampled_softmax(users.double(), items.double(), targets, negatives, 0.1, backend="triton")
    with pytest.raises(ValueError, match="width of users"):
        sampled_softmax(torch.zeros(4, 257), torch.zeros(5, 257), targets, negatives, 0.1, backend="triton")


def test_the_bench_compares_before_it_times_and_names_the_row_of_the_issue(monkeypatch):
    for name, size in (("NUM_TOKENS", 50), ("NUM_ITEMS", 30), ("NUM_NEGATIVES", 4), ("REPEATS", 1)):
        monkeypatch.setattr(bench, name, size)
    rows = bench.gather_over_ours(torch.get_num_threads())
    assert rows[0]["name"] == (
        "sampled softmax forward + backward, 13.9 k tokens, 3,706 items, d 50, 128 negatives: "
        "gather of [tokens, 128, d] / ours"
    )
    assert rows[0]["target"] == 3.0
    assert [row["unit"] for row in rows[1:]] == ["ms"] * 3
    monkeypatch.setattr(bench, "_ours", lambda *inputs: 2 * bench._gather(*inputs))
    with pytest.raises(RuntimeError, match="disagrees"):
        bench.gather_over_ours(torch.get_num_threads())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES, (1000, 3000, 256, 128), (1000, 3000, 50, 512), (300, 200, 128, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_equals_the_reference_and_repeats_bit_for_bit(shape, kind, dtype):
    assert not interpreted()
    inputs = make_inputs(*shape, kind=kind, dtype=dtype, device="cuda")
    got, expected = run(kind, inputs, None), truth(kind, inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, run(kind, inputs, None), strict=True))
    if dtype == torch.float32:
        assert_close(got, expected)
    elif shape[0]:
        limit = 5e-3 if dtype == torch.float16 else 1e-2
        assert all(rms_ratio(a, b) <= limit or b.abs().max() < 1e-3 for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("num_items", [32_767, 32_768])
def test_tables_at_the_border_of_short_ids_get_every_gradient(num_items):
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(rows, 4, generator=generator, requires_grad=True) for rows in (30, num_items)]
    targets, negatives = (
        torch.randint(num_items - 40, num_items, shape, generator=generator) for shape in ((30,), (30, 9))
    )
    ours, truth = (
        torch.autograd.grad(sampled_softmax(*leaves, targets, negatives, 0.5, backend=backend).sum(), leaves)
        for backend in ("cpu", "reference")
    )
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
