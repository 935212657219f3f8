"""The speed table has the rows and the targets of its specification, whatever the model is."""

from dataclasses import replace

import pytest

from gr_platform.commands.bench import reaches_target
from serving.bench import models, speed, wire

# Name -> target, whether it is a bound from above.
TABLE = {
    "uncached / cached, n 2,048, m 256": (3.5, False),
    "uncached / cached, n 1,024, m 256": (2.3, False),
    "full prefill + 256 / delta of 1 event + 256, n 1,024": (2.3, False),
    "full forward one candidate at a time / cached M-FALCON, n 512, m 1,024": (100, False),
    "cached scoring, share of `torch.mm` peak, n 1,024, m 1,024": (40, False),
    "T(2x) / T(x), each doubling of m from 256 to 8,192 and of n from 256 to 4,096, cached": (2.2, True),
    "retrieval, best 100 of 1 M items of d 64": (100, True),
    "gRPC round trip / the same engine call in process, n 512, m 512": (1.15, True),
    "throughput, dynamic batching on / off, hits, n 256, m 16, d 64, 8 users": (1.3, False),
    "the same at m 512, d 256": (0.95, False),
}


@pytest.fixture(scope="module")
def rows():
    with pytest.MonkeyPatch.context() as patch:
        small = replace(models.speed_table(64), embedding_dim=8, num_layers=2, num_heads=1, qk_dim=4, v_dim=4)
        patch.setattr(models, "speed_table", lambda max_events: small)
        patch.setattr(speed, "SEARCHED_ITEMS", 1_000)
        patch.setattr(speed, "DOUBLED_M", (2, 4))
        patch.setattr(wire, "_served", pytest.fail)
        patch.setattr(wire, "_round_trip", lambda *_: {"name": list(TABLE)[-3], "target": 1.15, "at_most": True})
        patch.setattr(wire, "_batching", lambda name, *_: {"name": name, "target": _[2]})
        return [*speed.run(1), *wire.rows(1)]


def test_every_row_is_there_with_its_target(rows):
    found = {row["name"]: (row["target"], row.get("at_most", False)) for row in rows if row["target"] is not None}
    assert found == TABLE


def test_figures_of_this_machine_are_finite_and_judged(rows):
    measured = [row for row in rows if "value" in row]
    assert all(row["value"] > 0 for row in measured)
    assert all(reaches_target(row) is not None for row in measured if row["target"] is not None)


def test_a_grown_history_begins_with_the_one_before():
    short, long = (speed.request(1_024, 16, seed=9, num_more=more).history for more in (0, 7))
    assert len(long.items) == len(short.items) + 7
    for name in ("items", "actions", "times"):
        assert (getattr(long, name)[: len(short.items)] == getattr(short, name)).all()


def test_operations_are_counted_as_the_limits_of_the_table_are():
    config = models.speed_table(2_048)
    once = speed.num_flops(config, 2_048, 1)
    assert once == 4 * (2 * 256 * 1_024 + 2 * 256 * 256 + 2 * 2_048 * 4 * 128)
    assert speed.num_flops(config, 2_048, 256) == 256 * once
    # Three layers of all tokens, each seeing half of them, and K/V of a fourth.
    token = 2 * 256 * 1_024 + 2 * 256 * 256
    assert speed.prefill_flops(config, 2_048) == 2_048 * (3 * (token + 2_048 * 512) + 2 * 256 * 512)
