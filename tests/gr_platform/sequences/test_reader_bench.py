"""The reader's benchmark measures what it says; how fast that is, no test asks."""

from gr_platform.sequences import bench


def test_every_way_to_read_is_measured_on_segments_that_are_deleted_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setenv("GR_HOME", str(tmp_path))
    rows = bench.run(1, num_users=400, seconds=0.01)
    assert all(row["value"] > 0 for row in rows)
    assert len({row["name"] for row in rows}) == len(rows) == 16
    with_target = [row["name"] for row in rows if row["target"] == bench.TARGET]
    assert len(with_target) == 8
    assert sum("days on top" in name for name in with_target) == 4
    kept, read = ([row["value"] for row in rows if row["name"].endswith(end)] for end in ("kept", "read"))
    assert all(a < b for a, b in zip(kept, read, strict=True))
    assert not list(tmp_path.iterdir())


def test_the_segments_are_sequences_as_the_platform_keeps_them(tmp_path):
    folders = bench._write(tmp_path, 300)
    base, whole = bench._warm(folders[:1]), bench._warm(folders)
    assert base.num_users == whole.num_users == 300
    assert whole.num_exposures == base.num_exposures + sum(bench._warm([f]).num_exposures for f in folders[1:])
    for _, block in whole.blocks():
        same = block.owner[1:] == block.owner[:-1]
        assert (block.times[1:] >= block.times[:-1])[same].all()
