"""The gated norm: every backend is the reference, the mask is one function of seed, row and column."""

import itertools
import math

import pytest
import torch

from kernels.dropout import _keys as dropout_keys
from kernels.dropout import keep_mask
from kernels.norm_gate import bench, hash_dropout, norm_gate, norm_gate_linear
from kernels.norm_gate.cpu import TILE_ELEMENTS

PATHS = ["cpu", "triton"]
# Rows 0, 1, 63, block + 1 and 1000; widths odd, even and beyond a block of the interpreter.
SHAPES = [(0, 50), (1, 50), (63, 17), (1000, 50), (65_536 // 64 + 1, 50), (7, 3), (70, 130)]
SEED = torch.tensor([-(1 << 40) + 5])


def rounded(*shape, dtype, seed=0):
    """Return values that `dtype` holds, in fp64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).double()


def leaves_of(num_rows, width, dtype, out_width=20):
    shapes = [(num_rows, width), (num_rows, 3 * width), (out_width, width), (out_width,), (num_rows, out_width)]
    return [rounded(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def results(values, p, backend, dtype, device="cpu"):
    """Return outputs and every gradient of the three ops; u is a column slice."""
    leaves = [value.to(device, dtype).requires_grad_() for value in values]
    attention, wide, weight, bias, residual = leaves
    seed, width = SEED.to(device) if p else None, attention.shape[1]
    u = wide[:, width : 2 * width]
    gated = norm_gate(attention, u, dropout=p, seed=seed, backend=backend)
    out = norm_gate_linear(attention, u, weight, bias, residual, dropout=p, seed=seed, backend=backend)
    dropped = hash_dropout(attention * 1, p, seed, backend=backend)
    found = [gated, out, dropped]
    for output, inputs in ((gated, [attention, wide]), (out, leaves), (dropped, [attention])):
        grad = rounded(*output.shape, dtype=dtype, seed=9).to(device, dtype)
        found += torch.autograd.grad(output, inputs, grad)
    return [x.detach().cpu() for x in found]


def assert_close(found, expected, bound):
    for got, want in zip(found, expected, strict=True):
        assert got.shape == want.shape
        if want.numel():
            assert (got.double() - want).abs().max() <= bound * want.abs().max()


def assert_close_rms(found, expected, bound):
    for got, want in zip(found, expected, strict=True):
        if want.numel():
            assert (got.double() - want).square().mean().sqrt() <= bound * want.square().mean().sqrt()


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("num_rows", "width"), SHAPES)
def test_fp32_output_and_every_gradient_match_the_reference(num_rows, width, p, backend, poisoned_empty):
    values = leaves_of(num_rows, width, torch.float32)
    expected = results(values, p, "reference", torch.float64)
    assert_close(results(values, p, backend, torch.float32), expected, 1e-5)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_matches_the_reference(dtype, backend, poisoned_empty):
    values = leaves_of(301, 50, dtype)
    expected = results(values, 0.2, "reference", torch.float64)
    bound = 5e-3 if dtype == torch.float16 else 2e-2
    assert_close_rms(results(values, 0.2, backend, dtype), expected, bound)


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("num_rows", "width"), [*SHAPES, (1000, 256), (33, 4096)])
def test_a_gpu_matches_the_reference(num_rows, width, p):
    values = leaves_of(num_rows, width, torch.float32)
    expected = results(values, p, "reference", torch.float64)
    assert_close(results(values, p, "triton", torch.float32, "cuda"), expected, 1e-5)
    halves = leaves_of(num_rows, width, torch.bfloat16)
    expected = results(halves, p, "reference", torch.float64)
    assert_close_rms(results(halves, p, "triton", torch.bfloat16, "cuda"), expected, 2e-2)


@pytest.mark.parametrize("tile_rows_more", [0, 1])
def test_rows_of_every_cpu_tile_match_the_reference(tile_rows_more):
    width = 400
    values = leaves_of(TILE_ELEMENTS // width + tile_rows_more, width, torch.float32)
    expected = results(values, 0.2, "reference", torch.float64)
    assert_close(results(values, 0.2, "cpu", torch.float32), expected, 1e-5)


def mask_of(seed, num_rows, width, p, backend, device="cpu"):
    ones = torch.ones(num_rows, width, device=device)
    return hash_dropout(ones, p, torch.tensor([seed], device=device), backend=backend).bool().cpu()


SEEDS = [0, 1, -1, 123_456_789, (1 << 40) + 7, -(1 << 63), (1 << 63) - 1]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_mask_has_the_same_bits_on_every_backend(seed):
    for (num_rows, width), p in itertools.product([(333, 7), (40, 1030)], [0.001, 0.2, 0.5, 0.9999]):
        expected = mask_of(seed, num_rows, width, p, "reference")
        assert torch.equal(keep_mask(torch.tensor([seed]), num_rows, width, p), expected)
        for backend in PATHS:
            assert torch.equal(mask_of(seed, num_rows, width, p, backend), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", SEEDS)
def test_the_mask_has_the_same_bits_on_a_gpu(seed):
    expected = mask_of(seed, 333, 1030, 0.2, "reference")
    assert torch.equal(mask_of(seed, 333, 1030, 0.2, "triton", "cuda"), expected)


def test_the_mask_does_not_change_between_versions():
    """A seed stored with a run keeps its meaning: these bits are part of the op."""
    bits = keep_mask(torch.tensor([42]), 4, 16, 0.5).long()
    words = [int("".join(map(str, row)), 2) for row in bits.tolist()]
    assert words == [0x272A, 0xB86A, 0x362D, 0xD2B4]


def standardised(seed, num_rows, width, p):
    return (keep_mask(torch.tensor([seed]), num_rows, width, p).double() - (1 - p)) / math.sqrt(p * (1 - p))


@pytest.mark.parametrize("p", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2, 987_654_321])
def test_the_share_that_is_kept_is_within_4_sigma(seed, p):
    values = standardised(seed, 2000, 500, p)
    assert abs(values.sum()) <= 4 * math.sqrt(values.numel())
    # Means of rows and of columns spread as those of independent draws do: variance 1, within 4 sigma of its estimate.
    for axis, count, size in ((0, 500, 2000), (1, 2000, 500)):
        variance = (values.sum(axis) / math.sqrt(size)).var()
        assert abs(variance - 1) <= 4 * math.sqrt(2 / count) + 4 / size / p / (1 - p)


def test_neighbouring_seeds_rows_and_columns_are_uncorrelated():
    num_rows, width, reach = 1500, 300, 8
    values = standardised(7, num_rows + reach, width + reach, 0.2)
    base = values[:num_rows, :width]
    others = [values[i : i + num_rows, j : j + width] for i, j in itertools.product(range(reach), repeat=2) if i + j]
    for seed in (6, 8, 7 + (1 << 32), -8):
        other = standardised(seed, num_rows + 2, width + 2, 0.2)
        others += [other[i : i + num_rows, j : j + width] for i, j in itertools.product(range(3), repeat=2)]
    sums = torch.stack([(base * other).sum() for other in others]) / math.sqrt(num_rows * width)
    # About a hundred draws of a normal: the largest stays below 4.5 but once in two thousand such sets.
    assert sums.abs().max() <= 4.5
    assert 0.5 <= sums.square().mean() <= 1.6


def test_no_two_rows_or_columns_share_their_mask():
    values = standardised(3, 800, 800, 0.2)
    for products in (values @ values.T, values.T @ values):
        off_diagonal = products[~torch.eye(800, dtype=torch.bool)] / math.sqrt(800)
        assert off_diagonal.abs().max() <= 7
        assert abs(off_diagonal.square().mean() - 1) <= 0.05


def test_rectangles_of_the_mask_are_uncorrelated():
    """Keys of rows and columns are mixed apart: their combination must not leave four corners dependent."""
    values = standardised(5, 1001, 801, 0.5)
    for step in (1, 2, 16, 100):
        corners = values[:-step, :-step] * values[step:, step:] * values[step:, :-step] * values[:-step, step:]
        assert abs(corners.sum()) <= 4 * math.sqrt(corners.numel())


def test_row_and_column_beyond_2_to_32_elements_do_not_wrap_onto_the_first():
    """Element 2^32 of a width of 2^16 is row 2^16, column 0: its bits are not those of row 0."""
    width, row = 1 << 16, torch.tensor([0, 1 << 16])
    num_rows = (1 << 16) + 1
    keys, multipliers, offsets = dropout_keys(torch.tensor([1]), num_rows, width)
    assert keys[row[0]] != keys[row[1]]
    bits = (keys[row][:, None] * multipliers + offsets) & 0xFFFFFFFF
    assert (bits[0] != bits[1]).float().mean() > 0.99


def test_gradcheck_of_the_cpu_path():
    values = [value.requires_grad_() for value in leaves_of(3, 4, torch.float64, out_width=2)]

    def run(attention, wide, weight, bias, residual):
        u = wide[:, 4:8]
        linear = norm_gate_linear(attention, u, weight, bias, residual, dropout=0.4, seed=SEED, backend="cpu")
        gated = norm_gate(attention, u, dropout=0.4, seed=SEED, backend="cpu")
        return linear, gated, hash_dropout(residual, 0.4, SEED, backend="cpu")

    assert torch.autograd.gradcheck(run, values)


def op_cases():
    attention, wide, weight, bias, residual = (x.float().requires_grad_() for x in leaves_of(6, 8, torch.float32))
    u = wide[:, 8:16]
    for p, seed in ((0.0, None), (0.3, SEED)):
        yield torch.ops.gr.norm_gate.default, (attention, u, p, seed, 1e-6, "cpu")
        yield torch.ops.gr.norm_gate_linear.default, (attention, u, weight, bias, residual, p, seed, 1e-6, "cpu")
    yield torch.ops.gr.hash_dropout.default, (attention, 0.3, SEED, "cpu")


@pytest.mark.parametrize("case", range(5))
def test_opcheck(case):
    op, args = list(op_cases())[case]
    torch.library.opcheck(op, args)


class Gates(torch.nn.Module):
    def forward(self, attention, wide, weight, bias, residual, seed):
        u = wide[:, 8:16]
        gated = norm_gate(attention, u, dropout=0.2, seed=seed)
        out = norm_gate_linear(attention, u, weight, bias, residual, dropout=0.2, seed=seed)
        return gated.sum() + hash_dropout(out, 0.2, seed).sum()


def test_export_and_compile_give_the_eager_result():
    args = [value.float() for value in leaves_of(6, 8, torch.float32)] + [SEED]
    expected = Gates()(*args)
    with torch.inference_mode():
        assert torch.equal(Gates()(*args), expected)
    assert torch.equal(torch.export.export(Gates(), tuple(args)).module()(*args), expected)
    leaves = [value.requires_grad_() for value in args[:-1]]
    compiled = torch.compile(Gates(), fullgraph=True, backend="aot_eager")(*leaves, SEED)
    assert torch.allclose(compiled, expected)
    grads = [torch.autograd.grad(y, leaves) for y in (compiled, Gates()(*leaves, SEED))]
    assert all(torch.allclose(a, b) for a, b in zip(*grads, strict=True))


def bad_inputs():
    x = torch.ones(4, 6)
    tensors = {"attention": x, "u": x, "weight": x, "bias": torch.ones(4), "residual": torch.ones(4, 4)}
    good = tensors | {"dropout": 0.2, "seed": SEED}
    yield "attention", good | {"attention": torch.ones(4)}
    yield "attention", good | {"attention": x.long()}
    yield "attention", good | {"attention": torch.ones(6, 4).t()}
    yield "u", good | {"u": torch.ones(4, 5)}
    yield "u", good | {"u": x.double()}
    yield "u", good | {"u": torch.ones(4, 6, 2)[..., 0]}
    yield "weight", good | {"weight": torch.ones(4, 5)}
    yield "bias", good | {"bias": torch.ones(5)}
    yield "residual", good | {"residual": torch.ones(3, 4)}
    yield "dropout", good | {"dropout": 1.0}
    yield "dropout", good | {"dropout": -0.1}
    yield "seed", good | {"seed": None}
    yield "seed", good | {"seed": torch.tensor([1.0])}
    yield "seed", good | {"seed": torch.tensor(1)}
    yield "backend", good | {"backend": "cuda"}


@pytest.mark.parametrize("case", range(15))
def test_bad_input_is_refused_by_name(case):
    name, arguments = list(bad_inputs())[case]
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        norm_gate_linear(**arguments)


def test_a_layer_keeps_12_d_against_the_papers_14_d():
    """Input 2 d, uvqk 8 d, attention 2 d; the gated rows are formed again."""
    rows = {row["name"]: row["value"] for row in bench.activation_bytes(num_tokens=64, width=128)}
    for dtype in ("bfloat16", "float32"):
        assert rows[f"activations, HSTU layer, {dtype}"] <= 12.01
        assert rows[f"activations, HSTU layer, gated rows saved, {dtype}"] <= 14.01
        assert rows[f"activations, Transformer layer, {dtype}"] >= 33.0


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_gradients_may_be_expanded_or_transposed(backend):
    x = torch.ones(4, 8, requires_grad=True)
    grads = [torch.tensor(1.0).expand(4, 8), torch.arange(32.0).view(8, 4).t()]
    for grad in grads:
        strided = torch.autograd.grad(hash_dropout(x, 0.5, SEED, backend=backend), x, grad)[0]
        plain = torch.autograd.grad(hash_dropout(x, 0.5, SEED, backend="reference"), x, grad.contiguous())[0]
        assert torch.equal(strided, plain)
