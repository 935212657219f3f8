"""Stochastic Length: how many and which exposures are kept."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr_platform.sequences.subsequence import kept_exposures, kept_lengths, recency_weights, thinned_length

CHOICES = ["recent", "recency", "uniform"]


def thin(lengths, *, choice="recency", max_length=64, alpha=1.5, seed=1, epoch=0, users=None, times=None):
    """Return the kept lengths and the kept places of each user in its own sequence."""
    lengths = np.asarray(lengths, np.int64)
    users = np.arange(len(lengths)) if users is None else np.asarray(users)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if times is None:
        times = np.concatenate([np.arange(n) * 1000 for n in lengths] or [np.zeros(0, np.int64)])
    kept = kept_lengths(lengths, users, max_length=max_length, alpha=alpha, seed=seed, epoch=epoch)
    places = kept_exposures(offsets, times, kept, users, choice=choice, seed=seed, epoch=epoch)
    cuts = np.cumsum(kept)[:-1] if len(kept) else []
    parts = np.split(places, cuts)
    return kept, [(part - begin).tolist() for part, begin in zip(parts, offsets[:-1], strict=False)]


@settings(deadline=None, max_examples=150)
@given(
    lengths=st.lists(st.integers(0, 64), max_size=12),
    choice=st.sampled_from(CHOICES),
    alpha=st.floats(1.01, 2.0),
    seed=st.integers(0, 3),
    gap=st.sampled_from([0, 1, 10**11]),
)
def test_what_is_kept_is_ordered_distinct_ends_with_the_newest_and_has_the_length(lengths, choice, alpha, seed, gap):
    times = np.concatenate([np.arange(n) * gap for n in lengths] or [np.zeros(0)]).astype(np.int64)
    kept, places = thin(lengths, choice=choice, alpha=alpha, seed=seed, times=times)
    short = thinned_length(64, alpha)
    for n, k, chosen in zip(lengths, kept.tolist(), places, strict=True):
        assert k == n if n <= short else k in (short, n)
        assert len(chosen) == k
        assert sorted(set(chosen)) == chosen
        assert all(0 <= place < n for place in chosen)
        if n:
            assert chosen[-1] == n - 1
        if choice == "recent":
            assert chosen == list(range(n - k, n))


@settings(deadline=None, max_examples=60)
@given(
    users=st.lists(
        st.tuples(st.integers(0, 10**6), st.integers(0, 64)), min_size=1, max_size=9, unique_by=lambda u: u[0]
    ),
    choice=st.sampled_from(CHOICES),
    epoch=st.integers(0, 3),
    data=st.data(),
)
def test_what_is_kept_of_a_user_depends_on_no_batch_mate(users, choice, epoch, data):
    rows, lengths = [row for row, _ in users], [length for _, length in users]
    _, together = thin(lengths, users=rows, choice=choice, epoch=epoch)
    order = data.draw(st.permutations(range(len(users))))
    _, shuffled = thin([lengths[i] for i in order], users=[rows[i] for i in order], choice=choice, epoch=epoch)
    assert shuffled == [together[i] for i in order]
    for i, (row, length) in enumerate(users):
        assert thin([length], users=[row], choice=choice, epoch=epoch)[1] == [together[i]]


def test_seed_epoch_and_user_change_the_draw():
    drawn = {
        tuple(thin([60], users=[user], seed=seed, epoch=epoch, alpha=1.2)[1][0])
        for user in range(3)
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(drawn) > 20


def test_alpha_2_keeps_all_and_a_whole_power_is_not_rounded_down():
    lengths = np.arange(65)
    assert (kept_lengths(lengths, lengths, max_length=64, alpha=2.0, seed=0, epoch=0) == lengths).all()
    assert thinned_length(1024, 1.6) == 256
    assert [thinned_length(n, 2.0) for n in (1, 41, 101, 8192, 10**6 + 1)] == [1, 41, 101, 8192, 10**6 + 1]
    assert thinned_length(4096, 1.6) == 776  # the paper's example


@pytest.mark.parametrize(("n", "alpha"), [(600, 1.6), (1024, 1.6), (1024, 1.8), (900, 1.2)])
def test_a_long_sequence_is_cut_with_the_papers_probability(n, alpha):
    num_users = 20_000
    kept = kept_lengths(np.full(num_users, n), np.arange(num_users), max_length=1024, alpha=alpha, seed=3, epoch=1)
    expected = 1 - 1024**alpha / n**2
    share = float((kept < n).mean())
    assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / num_users) + 1e-9
    assert set(kept.tolist()) <= {n, thinned_length(1024, alpha)}


def test_sparsity_rises_with_length_and_falls_with_alpha():
    """The paper's table in spirit: users with long histories, cut to N_c; figures depend on their lengths."""
    histories = np.exp(np.random.default_rng(0).normal(np.log(3000), 1.0, 20_000)).astype(np.int64)
    sparsity = {}
    for alpha in (1.6, 1.8):
        for longest in (1024, 2048, 4096, 8192):
            lengths = np.clip(histories, 1, longest)
            kept = kept_lengths(lengths, np.arange(20_000), max_length=longest, alpha=alpha, seed=1, epoch=0)
            sparsity[alpha, longest] = 1 - kept.sum() / lengths.sum()
    assert all(sparsity[1.6, longest] > sparsity[1.8, longest] for longest in (1024, 2048, 4096, 8192))
    assert 0.55 < sparsity[1.6, 1024] < 0.8
    assert 0.3 < sparsity[1.8, 1024] < 0.5
    # Everyone at N_c: the expectation is exact.
    full = kept_lengths(np.full(20_000, 4096), np.arange(20_000), max_length=4096, alpha=1.6, seed=1, epoch=0)
    cut = 1 - 4096**1.6 / 4096**2
    assert full.mean() == pytest.approx(cut * 776 + (1 - cut) * 4096, rel=0.02)


def inclusion(choice, n, times=None, num_users=6_000):
    """Return how often each of n exposures is kept, among users who were cut."""
    lengths = np.full(num_users, n)
    kept, places = thin(
        lengths, choice=choice, alpha=1.2, max_length=n, times=None if times is None else np.tile(times, num_users)
    )
    cut = [chosen for chosen, k in zip(places, kept, strict=True) if k < n]
    return np.bincount(np.concatenate(cut), minlength=n) / len(cut), thinned_length(n, 1.2)


def test_uniform_keeps_every_exposure_but_the_newest_equally_often():
    share, k = inclusion("uniform", 20)
    assert share[-1] == 1
    np.testing.assert_allclose(share[:-1], (k - 1) / 19, atol=0.035)


def test_equal_times_make_recency_uniform():
    share, k = inclusion("recency", 20, times=np.zeros(20, np.int64))
    np.testing.assert_allclose(share[:-1], (k - 1) / 19, atol=0.035)


def test_recency_draws_like_sequential_weighted_sampling_without_replacement():
    rng = np.random.default_rng(5)
    times = np.sort(rng.integers(0, 10**9, 20))
    share, k = inclusion("recency", 20, times=times)
    weights = recency_weights(np.array([20]), times)[:-1].astype(np.float64)
    expected = np.zeros(20)
    for _ in range(4_000):
        expected[rng.choice(19, k - 1, replace=False, p=weights / weights.sum())] += 1 / 4_000
    expected[-1] = 1
    np.testing.assert_allclose(share, expected, atol=0.04)
    assert share[0] < 0.1 < share[10]


def test_weights_are_linear_in_age_within_a_user():
    times = np.array([0, 500, 1000, 7, 7, 3])
    found = recency_weights(np.array([3, 2, 1]), times)
    np.testing.assert_allclose(found, [1 / 3, 2 / 3, 1, 1, 1, 1], rtol=1e-6)
