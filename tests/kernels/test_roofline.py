"""The arithmetic of the roofline: by hand on shapes small enough, and against what tensors really hold."""

import pytest
import torch

from kernels import roofline
from kernels.hstu_attention.reference import visible_distance
from kernels.roofline import Gpu, Shape, Work

SMALL = Shape(num_users=2, history=3, num_targets=2, heads=4, qk_dim=8, v_dim=16, model_dim=32)
PLAIN = Gpu(name="plain", tensor_tflops=100, core_tips=10, special_tips=1, memory_gbs=1000, source="made up")


@pytest.mark.parametrize(("history", "targets"), [(3, 2), (1, 0), (0, 4), (17, 5)])
def test_pairs_are_those_that_the_reference_lets_attend(history, targets):
    shape = Shape(num_users=2, history=history, num_targets=targets, heads=1, qk_dim=1, v_dim=1, model_dim=1)
    sees, _ = visible_distance(history + targets, targets, 0)
    assert shape.pairs == 2 * int(sees.sum())


def test_the_public_shape_by_hand():
    assert roofline.PUBLIC.tokens == 98_304
    assert roofline.PUBLIC.pairs == 32 * (524_800 + 2_048 * 1_025)
    forward = roofline.attention_forward(roofline.PUBLIC)
    assert forward.tensor_flops == 2 * roofline.PUBLIC.pairs * 4 * 256
    # q, k, v and the result in bf16, two times of 8 bytes.
    assert forward.memory_bytes == 98_304 * (4 * 512 * 2 + 16)
    assert roofline.uvqk_forward(roofline.PUBLIC).tensor_flops == 2 * 98_304 * 512 * 2_048


def test_the_backward_forms_nine_products():
    one = Shape(num_users=1, history=1, num_targets=0, heads=1, qk_dim=1, v_dim=1, model_dim=1)
    assert roofline.attention_backward(one).tensor_flops == 9 * 2
    uneven = Shape(num_users=1, history=1, num_targets=0, heads=1, qk_dim=10, v_dim=1, model_dim=1)
    # Of width qk_dim: three times Q K^T, dK, dQ; of width v_dim: three times dO V^T, dV.
    assert roofline.attention_backward(uneven).tensor_flops == 2 * (5 * 10 + 4)


def test_rab_costs_instructions_alone():
    ours, bare = (roofline.attention_forward(SMALL, with_rab=with_rab) for with_rab in (True, False))
    assert ours.core_instructions > 2 * bare.core_instructions
    assert (ours.tensor_flops, ours.memory_bytes) == (bare.tensor_flops, bare.memory_bytes)


def test_every_part_has_instructions_for_both_head_dims():
    for part, by_dim in roofline.PAIR_INSTRUCTIONS.items():
        assert set(by_dim) == {64, 128}, part
        assert all(0 < special < every for every, special in by_dim.values()), part


def test_cached_scoring_leaves_out_what_the_cache_holds():
    whole, cached = roofline.attention_forward(SMALL), roofline.attention_cached(SMALL)
    history = roofline.attention_forward(
        Shape(num_users=2, history=3, num_targets=0, heads=4, qk_dim=8, v_dim=16, model_dim=32)
    )
    assert cached.tensor_flops == whole.tensor_flops - history.tensor_flops
    assert cached.memory_bytes < whole.memory_bytes


def test_rowwise_adamw_counts_every_byte_of_its_tensors_once_each_way():
    weight, moment, grad = (torch.empty(10, 7) for _ in range(3))
    square, rows = torch.empty(10), torch.empty(10, dtype=torch.int64)
    expected = sum(x.nbytes for x in (weight, moment, square)) * 2 + grad.nbytes + rows.nbytes
    assert roofline.rowwise_adamw(10, 7).memory_bytes == expected


@pytest.mark.parametrize(
    ("work", "milliseconds"),
    [
        (Work(name="products", kind="gemm", tensor_flops=65e9), 1.0),
        (Work(name="instructions", kind="rows", core_instructions=6e9), 1.0),
        (Work(name="special", kind="rows", core_instructions=5e9, special_instructions=6e8), 1.0),
        (Work(name="bytes", kind="rows", memory_bytes=8e8), 1.0),
        (Work(name="both units", kind="attention", tensor_flops=40e9, core_instructions=6e9), 2.0),
        (Work(name="traffic is longer", kind="gemm", tensor_flops=65e9, memory_bytes=24e8), 3.0),
    ],
    ids=lambda x: x.name if isinstance(x, Work) else "",
)
def test_a_kernel_takes_the_longer_of_arithmetic_and_traffic(work, milliseconds):
    assert roofline.predicted_ms(work, PLAIN) == pytest.approx(milliseconds)


def test_every_gpu_says_where_its_peaks_come_from_and_faster_ones_are_predicted_faster():
    a100, h100, h200 = roofline.GPUS
    assert all(gpu.source for gpu in roofline.GPUS)
    for _, works in roofline.SCENES:
        for work in works():
            slow, middle, fast = (roofline.predicted_ms(work, gpu) for gpu in (a100, h100, h200))
            assert slow > middle >= fast > 0.0


def test_rows_say_that_they_are_predictions():
    rows = roofline.rows()
    assert len({row["name"] for row in rows}) == len(rows)
    for row in rows:
        assert "predict" in row["name"] + row["unit"]
        assert row["target"] is None
    public = [row for row in rows if row.get("against_ms")]
    assert [row["gpu"] for row in public] == ["H100 SXM"] * 2
    assert all("9.30" in row["against"] for row in public)
    with_rab, without = (row["value"] for row in public)
    assert with_rab > without
