"""A bundle says what its model said, and a damaged one is refused."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from gr_platform.bundle import export
from gr_platform.bundle.compute import ITEM_BYTES, Ask, Piece, Tunable, page_bytes
from gr_platform.bundle.load import load
from gr_platform.bundle.verify import SHORT_TOLERANCE, parity
from gr_platform.errors import UserError
from gr_platform.models.compute import TorchCompute
from gr_platform.models.recipes import tiny
from gr_platform.models.tokens import ranking_tokens, retrieval_tokens
from tests.gr_platform.paging import NUM_PAGES, encode_in_pieces

NUM_ITEMS = 200


@pytest.fixture(scope="module", params=["retrieval", "ranking"])
def bundle_folder(request, tmp_path_factory, random_bundle):
    return random_bundle(tmp_path_factory.mktemp("bundle") / request.param, request.param, num_items=NUM_ITEMS)


def test_onnx_scores_equal_the_offline_model(bundle_folder):
    result = parity(load(bundle_folder))
    assert result.num_requests == 6
    assert result.max_abs_reference > 1e-3
    assert result.ok, result


def test_parity_sees_a_wrong_model(bundle_folder):
    bundle = load(bundle_folder)

    class Shifted:
        num_pages = NUM_PAGES

        def __init__(self, inner):
            self.inner = inner

        def encode(self, pieces):
            rows = self.inner.encode(pieces)
            return rows + 1e-3 * np.arange(rows.shape[1])

        def score(self, asks):
            return [scores + 1e-4 for scores in self.inner.score(asks)]

    assert not parity(bundle, Shifted(bundle.compute(NUM_PAGES))).ok


@pytest.mark.parametrize("path", ["onnx", "torch", "auto"])
def test_every_path_says_what_the_offline_model_said(bundle_folder, path):
    bundle = load(bundle_folder)
    compute = bundle.compute(NUM_PAGES, path=path)
    assert parity(bundle, compute).ok
    if isinstance(compute, Tunable):
        compute.tune()
        # Whatever this machine is faster at, and each going on from what the other encoded.
        for graph_to, graph_from in ((0, 0), (math.inf, math.inf), (0, math.inf), (math.inf, 0), (8, 4)):
            compute.graph_to = dict.fromkeys(compute.graph_to, graph_to)
            compute.graph_from = dict.fromkeys(compute.graph_from, graph_from)
            assert parity(bundle, compute).ok


def test_parity_sees_a_model_that_is_wrong_for_several_users_alone(tmp_path, random_bundle):
    bundle = load(random_bundle(tmp_path / "ranking", "ranking", num_items=NUM_ITEMS))
    compute = bundle.compute(8 * NUM_PAGES, path="torch")
    exact = compute.score
    assert parity(bundle, compute).ok
    compute.score = lambda asks: [scores + 1e-3 * (len(asks) > 1) for scores in exact(asks)]
    assert not parity(bundle, compute).ok


def test_each_path_that_may_score_is_held_against_the_golden_requests(tmp_path, random_bundle):
    bundle = load(random_bundle(tmp_path / "ranking", "ranking", num_items=NUM_ITEMS))
    compute = bundle.compute(NUM_PAGES)
    assert [parity(bundle, path).ok for path in compute.paths()] == [True, True]
    exact = compute.graph.score
    compute.graph.score = lambda asks: [scores + 1e-3 for scores in exact(asks)]
    assert [parity(bundle, path).ok for path in compute.paths()] == [True, False]
    compute.graph.score, encode = exact, compute.graph.encode

    def encode_wrongly(pieces):
        rows = encode(pieces)
        for piece in pieces:
            compute.graph.v.reshape(2, -1)[:, piece.pages] += 0.1
        return rows

    compute.graph.encode = encode_wrongly
    assert [parity(bundle, path).ok for path in compute.paths()] == [True, False]


def test_pieces_of_one_step_go_where_they_belong_and_their_rows_come_back_in_order(tmp_path, random_bundle):
    bundle = load(random_bundle(tmp_path / "retrieval", "retrieval", num_items=NUM_ITEMS))
    pieces, found = [], []
    for number, (length, wanted) in enumerate([(3, True), (20, True), (1, True), (9, False), (30, True), (5, True)]):
        ids = np.arange(5, 5 + length)
        tokens = retrieval_tokens(ids, np.ones(length, np.int64), ids * 1000 + number, 10**5)
        pages = np.arange(2 * number, 2 * number + 2, dtype=np.int32)
        pieces.append(Piece(tokens=tokens, past=0, pages=pages, keep=len(tokens) - wanted))
    compute = bundle.compute(NUM_PAGES)
    for graph_to in (0, 10, math.inf):
        compute.graph_to["together"] = graph_to
        found.append(compute.encode(pieces))
        assert found[-1].shape == (5, bundle.config.embedding_dim)
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=0, atol=1e-5 * np.abs(found[0]).max())


def test_both_paths_read_the_item_vectors_where_they_lie(tmp_path, random_bundle):
    bundle = load(random_bundle(tmp_path / "ranking", "ranking", num_items=NUM_ITEMS))
    compute = bundle.compute(NUM_PAGES)
    tokens = ranking_tokens(np.array([7]), np.ones(1, np.int64), np.zeros(1, np.int64), 10**5)
    keys = []
    for path, grows_by in ((compute.graph, 0.0), (compute.graph, 1.0), (compute.torch_path, 0.0)):
        with torch.no_grad():
            compute.torch_path.model.embedding.items.weight[7, 0] += grows_by
        encode_in_pieces(path, tokens, [], keeps_last=True, pages=np.zeros(1, np.int32))
        keys.append(compute.graph.k[:, 0, :3].copy())
    assert np.abs(keys[1] - keys[0]).max() > 0.01
    np.testing.assert_allclose(keys[2], keys[1], rtol=0, atol=1e-5)


def test_lists_of_one_step_go_where_they_belong_and_come_back_in_order(tmp_path, random_bundle):
    bundle = load(random_bundle(tmp_path / "ranking", "ranking", num_items=NUM_ITEMS))
    compute = bundle.compute(NUM_PAGES)
    tokens = ranking_tokens(np.arange(5, 15), np.ones(10, np.int64), np.arange(10) * 1000, 10**5)
    _, pages = encode_in_pieces(compute, tokens, [], keeps_last=True)
    sizes, lists = (3, 20, 0, 50, 4), []
    asks = [
        Ask(candidates=np.arange(5, 5 + size), request_time=10**5 + size, past=len(tokens), pages=pages)
        for size in sizes
    ]
    for graph_from in (math.inf, 10, 1):
        compute.graph_from["together"] = graph_from
        lists.append(compute.score(asks))
        assert [len(scores) for scores in lists[-1]] == list(sizes)
    for other in lists[1:]:
        for ours, expected in zip(other, lists[0], strict=True):
            np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0), (1, 1), (2, 16), (16, 2)])
def test_the_graph_takes_past_and_new_lengths_from_zero(bundle_folder, sizes):
    bundle = load(bundle_folder)
    rng = np.random.default_rng(0)
    history = (rng.integers(5, 205, 40), np.ones(40, np.int64), np.arange(40) * 1000 + 10**12)
    past_length, new_length = sizes
    tokens = ranking_tokens(*history, 10**13).slice(0, past_length + new_length)
    keys = []
    for cuts in ([past_length], []):
        compute = bundle.compute(NUM_PAGES, path="onnx")
        _, pages = encode_in_pieces(compute, tokens, cuts, keeps_last=True)
        keys.append(compute.k[:, pages].reshape(len(compute.k), -1, *compute.k.shape[3:])[:, : len(tokens)])
    np.testing.assert_allclose(*keys, atol=1e-5 * max(1.0, float(np.abs(keys[1]).max())))


def test_a_short_cache_is_half_as_large_rounds_and_needs_a_gpu(bundle_folder, monkeypatch):
    bundle = load(bundle_folder)
    model = bundle.compute(NUM_PAGES, path="torch").model
    exact, short = (TorchCompute(model, NUM_PAGES, cache_dtype=dtype) for dtype in (torch.float32, torch.float16))
    assert 2 * short.pages.k.nbytes == exact.pages.k.nbytes
    assert (
        page_bytes(bundle.config) - page_bytes(bundle.config, ITEM_BYTES["fp16"])
        == (short.pages.k.nbytes + short.pages.v.nbytes) // NUM_PAGES
    )
    error = parity(bundle, short).max_abs_error
    assert parity(bundle, exact).max_abs_error < error
    assert parity(bundle, short, SHORT_TOLERANCE).ok
    monkeypatch.setenv("GR_DEVICE", "cpu")
    for path, message in (("auto", "for a GPU, and there is none"), ("onnx", "the graphs keep fp32")):
        with pytest.raises(UserError, match=message):
            bundle.compute(NUM_PAGES, path=path, cache_dtype="bf16")


@pytest.mark.parametrize("name", ["model.safetensors", "encode.onnx", "vocabulary.parquet", "golden.safetensors"])
def test_a_flipped_byte_or_missing_file_is_refused_by_name(bundle_folder, tmp_path, name):
    damaged = shutil.copytree(bundle_folder, tmp_path / "damaged")
    content = bytearray((damaged / name).read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is corrupt"):
        load(damaged)
    (damaged / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        load(damaged)


def test_the_model_digest_changes_with_weights_and_not_with_metrics(tmp_path, random_bundle, monkeypatch):
    # The graphs take seconds to export and have no part in the digest: an empty file stands for them.
    monkeypatch.setattr(export, "write_graphs", lambda model, folder: (folder / "encode.onnx").touch())
    first = load(random_bundle(tmp_path / "a", "retrieval"))
    same = load(random_bundle(tmp_path / "b", "retrieval", metrics={"hr_at_10": 0.9}))
    other = load(random_bundle(tmp_path / "c", "retrieval", seed=5))
    assert first.digest == same.digest != other.digest
    longer = tiny("retrieval").model
    changed = {
        "constant": {"config": replace(longer, max_events=longer.max_events + 1)},
        "actions": {"actions": ("view", "like", "share"), "positives": ("view",), "tasks": {"like": ("like",)}},
        "vocabulary": {"item_ids": [f"item-{i}" for i in range(NUM_ITEMS)]},
    }
    digests = {name: load(random_bundle(tmp_path / name, "retrieval", **what)).digest for name, what in changed.items()}
    assert len({first.digest, *digests.values()}) == 1 + len(changed)


def test_a_manifest_changed_after_the_export_is_refused(bundle_folder, tmp_path):
    changes = {
        "longer window": lambda facts: facts["config"].update(max_events=1000),
        "other buckets": lambda facts: facts["time_thresholds_ms"].__setitem__(3, 5),
        "other digest": lambda facts: facts.update(model_digest="0" * 40),
        "a fact gone": lambda facts: facts.pop("tasks"),
        "another fact gone": lambda facts: facts.pop("declaration"),
    }
    for name, change in changes.items():
        folder = shutil.copytree(bundle_folder, tmp_path / name)
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest["facts"])
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match=f"the manifest of bundle {name}"):
            load(folder)


def test_a_bundle_of_another_export_is_refused_before_anything_is_computed(bundle_folder, tmp_path):
    folder = shutil.copytree(bundle_folder, tmp_path / "older")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["facts"]["export_version"] -= 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="bundle older was exported by another release; run gr materialize"):
        load(folder)
