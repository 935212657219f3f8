"""Kernels compiled for GPUs that are not here: nothing spills where it must not, and occupancy by hand."""

import pytest

from kernels import aot
from kernels.aot import Resources


@pytest.mark.parametrize(
    ("registers", "shared_bytes", "num_warps", "target", "warps"),
    [
        # 168 * 32 = 5,376 registers a warp: 3 of them in each quarter's 16,384, so 12 warps, 3 blocks.
        (168, 0, 4, "sm_80", 12),
        # 255 is given as 256: 8,192 a warp, 2 a quarter.
        (255, 0, 4, "sm_90", 8),
        (255, 0, 8, "sm_90", 8),
        # 32 * 32 = 1,024: 16 a quarter, all 64 warps.
        (32, 0, 4, "sm_90", 64),
        # Blocks of one warp: 32 blocks at most.
        (32, 0, 1, "sm_90", 32),
        # 100 KB and the reserved one: one block in 164 KB, two in 228 KB.
        (32, 100 << 10, 4, "sm_80", 4),
        (32, 100 << 10, 4, "sm_90", 8),
        (32, 100 << 10, 4, "sm_100", 8),
        # 16 warps of 136 registers: 3 a quarter are 12, less than a block.
        (136, 0, 16, "sm_90", 0),
        # AMD: 128 of 512 registers a lane and SIMD: 4 waves on each of 4 SIMDs, of 32.
        (128, 0, 4, "gfx942", 16),
        # 24 KB of 64 KB: two blocks.
        (32, 24 << 10, 4, "gfx942", 8),
    ],
)
def test_occupancy_is_what_one_counts_by_hand(registers, shared_bytes, num_warps, target, warps):
    resources = Resources(registers=registers, spilled_bytes=0, shared_bytes=shared_bytes)
    assert aot.occupancy(resources, num_warps, target) == warps / aot.LIMITS[target].warps


def test_every_target_has_limits():
    assert set(aot.LIMITS) == set(aot.TARGETS)
    assert set(aot.available_ops()) == set(aot.OPS)


def test_nothing_spills_on_hopper_where_it_must_not():
    """Compiled in other processes: TRITON_INTERPRET is set here."""
    ops = aot.available_ops()
    progress = []
    rows = aot.table(("sm_90",), spilling=False, on_progress=lambda done, total: progress.append((done, total)))
    assert {row["op"] for row in rows} == set(ops)
    assert progress[-1] == (len(rows), len(rows))
    assert [row["name"] for row in rows if row["value"] > row["target"]] == []
    assert [row["name"] for row in rows if row["occupancy"] == 0.0] == []
    assert len({row["name"] for row in rows}) == len(rows)
