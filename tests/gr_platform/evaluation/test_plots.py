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
    for picture in pictures:
        assert picture.startswith(PNG)
        assert len(picture) < 50_000
