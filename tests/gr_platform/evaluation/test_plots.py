from gr_platform.evaluation import plots

PNG = b"\x89PNG"


def test_every_plot_is_a_png_below_50_kb():
    curves = [{"epoch": e, "loss": 3 - e / 10, "tokens": 5, "hr_at_10": None if e == 0 else e / 20} for e in range(20)]
    edges = {"lower": 0.0, "upper": 9.0, "hr_at_10": 0.2, "hr_at_10_error": None}
    bins = [{"slice": name, "bin": str(b), **edges} for name in ("history_length", "user_age") for b in range(5)]
    curve = [{"num_targets": 10, "predicted": p / 10, "observed": p / 12} for p in range(10)]
    pictures = [
        plots.slices(bins),
        plots.slices([]),
        plots.calibration({"like": curve, "purchase": []}),
        plots.learning_curve(curves),
        plots.learning_curve([{"phase": "validation"} | each for each in curves] + [{"phase": "refit", **curves[0]}]),
        plots.metric_bars(
            {"HSTU": {"hr_at_10": 0.3, "mrr": None}, "popularity": {"hr_at_10": 0.1}}, ["hr_at_10", "mrr"]
        ),
    ]
    line = {"figure": "hr_at_10", "a": 0.2, "b": 0.3, "difference": 0.1, "low": -0.05, "high": 0.2, "p_value": 0.1}
    pictures += [
        plots.differences([line, line | {"figure": "like_ne", "a": 0.0}], "retrieval"),
        plots.differences([], "retrieval"),
        plots.slice_differences([row | line for row in bins]),
        plots.slice_differences([]),
    ]
    for picture in pictures:
        assert picture.startswith(PNG)
        assert len(picture) < 50_000


def test_figures_are_called_as_people_call_them():
    names = ("hr_at_10", "ndcg_at_200", "mrr", "ne", "like_ne", "ne_like", "buy_now_log_loss", "base_rate")
    called = ["HR@10", "NDCG@200", "MRR", "NE", "NE of like", "NE of like", "log loss of buy_now", "base rate"]
    assert [plots.label_of(name) for name in names] == called
    assert [plots.is_loss(name) for name in names] == [False, False, False, True, True, True, True, False]
