"""The data card: its figures against a count by hand, and a page that shows nobody and needs nothing."""

import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gr_platform.errors import UserError
from gr_platform.events import card as cards
from gr_platform.events.card import Card, make_card
from gr_platform.events.card_html import PAGE, build_card, copy_card, render
from gr_platform.events.card_plots import draw
from gr_platform.events.ingest import clean_events, ingest
from gr_platform.events.landing import import_file
from gr_platform.events.partitions import partition_facts

DAY_S = 86_400
START_S = 1_700_006_400  # 2023-11-15 00:00 UTC


@pytest.fixture
def log() -> list[dict[str, Any]]:
    """13 users; user u has u + 5 events, two at one time, then an hour apart, over two days; items repeat after 4."""
    return [
        {
            "user_id": 900_000_000 + user,
            "item_id": 700_000_000 + (user + step % 4) % 9,
            "action": "buy" if step % 5 == 4 else "view",
            "timestamp": START_S + (step // 2) * 3600 + user % 2 * DAY_S,
        }
        for user in range(13)
        for step in range(user + 5)
    ]


@pytest.fixture
def imported(home: Path, write_csv: Callable[..., Path], log: list[dict[str, Any]]) -> str:
    ds = import_file(write_csv(log), home=home).dataset
    ingest(home, ds)
    return ds


def _card(home: Path, ds: str) -> Card:
    return make_card(clean_events(home, ds), partition_facts(home, ds))


def test_figures_are_what_a_count_by_hand_gives(home: Path, imported: str, log: list[dict[str, Any]]) -> None:
    card = _card(home, imported)
    users, items = Counter(row["user_id"] for row in log), Counter(row["item_id"] for row in log)
    assert (card.num_events, card.num_users, card.num_items) == (len(log), len(users), len(items))
    assert card.rows_in == card.num_events + card.duplicates + sum(card.quarantined.values())
    assert dict(card.actions) == Counter(row["action"] for row in log)
    assert card.density == pytest.approx(len(log) / (len(users) * len(items)))
    for spread, sizes in ((card.per_user, users), (card.per_item, items)):
        assert sum(spread.counts) == len(sizes)
        assert spread.edges[-1] > max(sizes.values())
        assert spread.quantiles["max"] == max(sizes.values())
        assert spread.quantiles["mean"] == pytest.approx(len(log) / len(sizes))
    assert card.per_user.quantiles["median"] == 11
    assert sum(card.days) == sum(card.hours) == len(log)
    assert (len(card.days), card.days_a_bar) == (2, 1)
    assert card.hours == [Counter(row["timestamp"] // 3600 % 24 for row in log)[hour] for hour in range(24)]
    assert sum(card.gaps) == len(log) - len(users)
    # Each second event shares its time with the one before; the others are an hour later: bin 1 + floor(4 log10(3600)).
    ties = sum(count // 2 for count in users.values())
    assert card.ties == pytest.approx(ties / len(log))
    assert (card.gaps[0], card.gaps[15]) == (ties, sum(card.gaps) - ties)
    assert card.repeats == pytest.approx(sum(count - 4 for count in users.values()) / len(log))
    assert card.out_of_order == 0


def test_gini_is_zero_for_equal_items_and_near_one_for_a_single_hit() -> None:
    import numpy as np

    assert cards._popularity(np.array([5]), np.array([40]))[1] == pytest.approx(0.0)
    curve, gini = cards._popularity(np.array([1, 1_000_000]), np.array([999, 1]))
    assert gini == pytest.approx(0.998, abs=0.001)
    assert curve[0] == pytest.approx((0.001, 0.999), abs=0.001)
    assert curve[-1] == pytest.approx((1.0, 1.0))


def test_rows_in_another_order_than_their_times_are_counted(
    home: Path, write_csv: Callable[..., Path], log: list[dict[str, Any]]
) -> None:
    ds = import_file(write_csv(log[::-1]), home=home).dataset
    ingest(home, ds)
    card = _card(home, ds)
    assert card.out_of_order is not None
    assert card.out_of_order > 0.3


def test_a_large_log_is_sampled_by_whole_users(home: Path, imported: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _card(home, imported)
    monkeypatch.setattr(cards, "SAMPLED_EVENTS", whole.num_events // 2)
    half = _card(home, imported)
    assert 0 < half.sampled_events < whole.num_events
    assert sum(half.hours) == whole.num_events
    # Of an exact sample of users: each lacks one gap.
    assert half.sampled_events - sum(half.gaps) < whole.num_users
    monkeypatch.setattr(cards, "SAMPLED_EVENTS", 1)
    none = _card(home, imported)
    if not none.sampled_events:
        assert none.ties is none.repeats is none.out_of_order is none.median_gap_s is None
    assert "%" in render(none, draw(none), "d" * 40)


class _Outside(HTMLParser):
    """Collects whatever a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: Counter[str] = Counter()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.loads += [v or "" for k, v in attrs if k in ("src", "href") and not (v or "").startswith("data:")]


def test_the_page_needs_nothing_but_itself_and_shows_no_id(
    home: Path, imported: str, log: list[dict[str, Any]]
) -> None:
    page = (build_card(home, imported).folder / PAGE).read_text()
    found = _Outside()
    found.feed(page)
    assert found.loads == []
    assert found.tags["script"] == found.tags["link"] == 0
    assert found.tags["img"] == 6
    assert "url(" not in page
    text = re.sub(r'src="data:[^"]*"', "", page)
    assert len(text) < 30_000
    for row in log:
        assert str(row["user_id"]) not in text
        assert str(row["item_id"]) not in text
        assert str(row["timestamp"]) not in text
    assert "view" in text


def test_what_a_log_calls_its_actions_is_text_not_markup(
    home: Path, write_csv: Callable[..., Path], log: list[dict[str, Any]]
) -> None:
    evil = "<script>alert(1)</script>&'"
    ds = import_file(write_csv([row | {"action": evil} for row in log]), home=home).dataset
    ingest(home, ds)
    page = (build_card(home, ds).folder / PAGE).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;&#39;" in page


def test_the_same_events_have_the_same_card_and_new_ones_another(
    home: Path, imported: str, write_csv: Callable[..., Path], log: list[dict[str, Any]]
) -> None:
    first = build_card(home, imported)
    assert not first.reused
    again = build_card(home, imported)
    assert again.reused
    bytes_of = (first.folder / PAGE).read_bytes()
    (first.folder / PAGE).unlink()
    rebuilt = build_card(home, imported)
    assert (rebuilt.reused, rebuilt.manifest.digest) == (False, first.manifest.digest)
    assert (rebuilt.folder / PAGE).read_bytes() == bytes_of
    later = [row | {"timestamp": row["timestamp"] + DAY_S} for row in log]
    import_file(write_csv(later, "later.csv"), home=home, dataset=imported, ingest_date="2099-01-01")
    ingest(home, imported)
    assert build_card(home, imported).folder != first.folder


def test_every_picture_fits_the_event_log(home: Path, imported: str) -> None:
    for name, png in draw(_card(home, imported)).items():
        assert png.startswith(b"\x89PNG"), name
        assert len(png) < 50_000, name


def test_the_current_card_is_copied_and_a_missing_one_is_named(home: Path, imported: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data_card yet"):
        copy_card(home, imported, tmp_path / "card.html")
    page = build_card(home, imported).folder / PAGE
    assert copy_card(home, None, tmp_path / "card.html") == imported
    assert (tmp_path / "card.html").read_bytes() == page.read_bytes()
    for out in (tmp_path, tmp_path / "nowhere" / "card.html"):
        with pytest.raises(UserError, match="name a file in a folder that exists"):
            copy_card(home, imported, out)
