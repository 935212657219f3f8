from gr_platform.evaluation import plots

PNG = b"\x89PNG"


def test_every_plot_is_a_png_below_50_kb():
    curves = [{"epoch": e, "loss": 3 - e / 10, "tokens": 5, "hr_at_10": None if e == 0 else e / 20} for e in range(20)]
    pictures = [
        plots.learning_curve(curves),
        plots.metric_bars(
            {"HSTU": {"hr_at_10": 0.3, "mrr": None}, "popularity": {"hr_at_10": 0.1}}, ["hr_at_10", "mrr"]
        ),
    ]
    for picture in pictures:
        assert picture.startswith(PNG)
        assert len(picture) < 50_000
