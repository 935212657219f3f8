"""The uvqk projection: every backend is the reference, gradients included, and only x and weight are saved."""

import pytest
import torch

from kernels.uvqk import uvqk
from kernels.uvqk.cpu import MIN_TILE_ROWS

PATHS = ["cpu", "triton"]
# Rows 0, 1, 63, a block of the interpreter + 1 and 1000; widths odd and beyond a block.
SHAPES = [(0, 50, 200), (1, 50, 200), (63, 17, 33), (257, 270, 300), (1000, 50, 200), (5, 1, 3), (4, 8, 0)]


def rounded(*shape, dtype, seed=0):
    """Return values that `dtype` holds, in fp64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).double()


def inputs(num_rows, width, out_width, dtype):
    x, weight = rounded(num_rows, width, dtype=dtype) + 0.5, rounded(width, out_width, dtype=dtype, seed=1) * 0.25
    return x.to(dtype).double(), weight.to(dtype).double(), rounded(num_rows, out_width, dtype=dtype, seed=2)


def results(values, backend, dtype, device="cpu"):
    x, weight, grad = (value.to(device, dtype) for value in values)
    out = uvqk(x.requires_grad_(), weight.requires_grad_(), backend=backend)
    return [y.detach().cpu() for y in (out, *torch.autograd.grad(out, [x, weight], grad))]


def assert_close(found, expected, bound):
    for got, want in zip(found, expected, strict=True):
        assert got.shape == want.shape
        if want.numel():
            assert (got.double() - want).abs().max() <= bound * want.abs().max()


def assert_close_rms(found, expected, bound):
    for got, want in zip(found, expected, strict=True):
        assert (got.double() - want).square().mean().sqrt() <= bound * want.square().mean().sqrt()


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_output_and_every_gradient_match_the_reference(shape, backend, poisoned_empty):
    values = inputs(*shape, torch.float32)
    assert_close(results(values, backend, torch.float32), results(values, "reference", torch.float64), 1e-5)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_matches_the_reference(dtype, backend, poisoned_empty):
    values = inputs(301, 50, 200, dtype)
    bound = 5e-3 if dtype == torch.float16 else 2e-2
    assert_close_rms(results(values, backend, dtype), results(values, "reference", torch.float64), bound)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (1000, 256, 1024)])
def test_a_gpu_matches_the_reference(shape):
    values = inputs(*shape, torch.float32)
    assert_close(results(values, "triton", torch.float32, "cuda"), results(values, "reference", torch.float64), 1e-5)
    if min(shape):
        values = inputs(*shape, torch.bfloat16)
        expected = results(values, "reference", torch.float64)
        assert_close_rms(results(values, "triton", torch.bfloat16, "cuda"), expected, 2e-2)


@pytest.mark.parametrize("more", [0, 1])
def test_rows_of_every_cpu_tile_match_the_reference(more):
    values = inputs(2 * MIN_TILE_ROWS + more, 16, 1 << 10, torch.float32)
    assert_close(results(values, "cpu", torch.float32), results(values, "reference", torch.float64), 1e-5)


@pytest.mark.parametrize("backend", PATHS)
def test_rows_at_a_stride_are_read_where_they_stand(backend):
    wide, weight = torch.randn(20, 30), torch.randn(10, 24)
    views = wide[:, 10:20], weight[:, :12]
    expected = uvqk(views[0].contiguous(), views[1].contiguous(), backend=backend)
    assert torch.allclose(uvqk(*views, backend=backend), expected, atol=1e-6)


def test_a_mean_far_from_zero_costs_no_precision():
    x, weight, _ = inputs(64, 50, 200, torch.float32)
    x = (x + 100).float().double()
    assert_close([uvqk(x.float(), weight.float(), backend="triton")], [uvqk(x, weight, backend="reference")], 2e-5)


def test_gradcheck_of_the_cpu_path():
    x, weight = torch.randn(5, 4, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda a, b: uvqk(a, b, backend="cpu"), [x.requires_grad_(), weight.requires_grad_()]
    )


def test_opcheck():
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(8, 12, requires_grad=True)
    torch.library.opcheck(torch.ops.gr.uvqk.default, (x, weight, 1e-6, "cpu"))


class Projection(torch.nn.Module):
    def forward(self, x, weight):
        u, v, q, k = uvqk(x, weight).chunk(4, dim=1)
        return (u * v + q * k).sum()


def test_export_and_compile_give_the_eager_result():
    leaves = [torch.randn(6, 8, requires_grad=True), torch.randn(8, 12, requires_grad=True)]
    expected = Projection()(*leaves)
    with torch.no_grad():
        assert torch.equal(Projection()(*leaves), expected)
    dynamic = {"x": {0: torch.export.Dim("tokens")}, "weight": None}
    with torch.no_grad():
        exported = torch.export.export(Projection(), tuple(leaves), dynamic_shapes=dynamic)
    assert "gr.uvqk" in str(exported.graph)
    assert torch.equal(exported.module()(*leaves), expected)
    compiled = torch.compile(Projection(), fullgraph=True, backend="aot_eager")(*leaves)
    grads = [torch.autograd.grad(y, leaves) for y in (compiled, expected)]
    assert all(torch.allclose(a, b) for a, b in zip(*grads, strict=True))


def test_only_x_and_weight_are_saved():
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(8, 12, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()), lambda t: t):
        uvqk(x, weight)
    assert sorted(saved) == sorted([x.data_ptr(), weight.data_ptr()])


def bad_inputs():
    x, weight = torch.ones(4, 6), torch.ones(6, 8)
    yield "x", (torch.ones(4), weight)
    yield "x", (x.long(), weight)
    yield "x", (torch.ones(6, 4).t(), weight)
    yield "x", (torch.ones(4, 0), torch.ones(0, 8))
    yield "weight", (x, torch.ones(5, 8))
    yield "weight", (x, weight.double())
    yield "weight", (x, torch.ones(8, 6).t())


@pytest.mark.parametrize("case", range(7))
def test_bad_input_is_refused_by_name(case):
    name, arguments = list(bad_inputs())[case]
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        uvqk(*arguments)


@pytest.mark.parametrize("before", [1, 3, 700, 5000])
def test_rows_are_equal_to_1e_6_whoever_else_is_in_the_batch(before):
    generator = torch.Generator().manual_seed(before)
    x = torch.randn(before + 300, 50, generator=generator)
    weight = torch.randn(50, 200, generator=generator) * 0.1
    alone, together = uvqk(x[before:], weight), uvqk(x, weight)[before:]
    assert float((alone - together).abs().max()) <= 1e-6 * float(together.abs().max())
