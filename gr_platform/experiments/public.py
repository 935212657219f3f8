"""The experiments on public data sets: models beside baselines beside what others published.

Invariant: published rows are those of PAPER section 6, word for word; a figure that nobody published is left out.
"""

from dataclasses import replace
from typing import Any

from gr_platform.experiments.experiment import Cell, Experiment, Plot, Published, Table, Target
from gr_platform.models.config import Kind
from gr_platform.models.recipes import named

SEEDS = (1, 2, 3)
LAST_ITEM = (
    "Each user's last event is the test, the next-to-last the validation, in the stable order (user, time, source). "
    "The epoch is chosen on validation; the test is read once. Counted baselines count all but the last event. "
    "Every item of the catalogue that the data set allows is ranked, ties count against the model. HR and NDCG at "
    "chunk 1 (the paper's sliding window); `served` is the window that the server keeps."
)
RANK_COLUMNS = {
    "hr_at_10": "HR@10",
    "hr_at_50": "HR@50",
    "hr_at_200": "HR@200",
    "ndcg_at_10": "NDCG@10",
    "ndcg_at_200": "NDCG@200",
    "mrr": "MRR",
    "served_hr_at_10": "served HR@10",
    "served_ndcg_at_10": "served NDCG@10",
}
COSTS = {"epochs": "epochs", "train_seconds": "seconds"}
STANDARD_ERROR = 0.006


def ml_1m() -> Experiment:
    """Return the ML-1M table."""
    ds = "ml-1m"
    models = {
        "hstu": ("HSTU", "ml_1m", 14.0),
        "hstu_large": ("HSTU-large", "ml_1m_large", 45.0),
        "hstu_features": ("HSTU-large + features", "ml_1m_features", 55.0),
    }
    seeded = [
        Cell(
            name=f"{name}-seed-{seed}",
            label=label,
            dataset=ds,
            recipe=named(recipe, "retrieval").with_training(seed=seed),
            minutes=minutes,
        )
        for seed in SEEDS
        for name, (label, recipe, minutes) in models.items()
    ]
    others = {"sasrec": "SASRec", "transformer": "Transformer++", "gru4rec": "GRU4Rec", "bert4rec": "BERT4Rec"}
    once = [
        Cell(name=name, label=label, dataset=ds, recipe=named(f"ml_1m-{name}", "retrieval"), minutes=20.0)
        for name, label in others.items()
    ]
    first, more = seeded[: len(models)], seeded[len(models) :]
    return Experiment(
        name="ml_1m",
        title="MovieLens-1M",
        question="Does HSTU beat the sequence models before it on ML-1M, and do our figures reach the published ones?",
        protocol=LAST_ITEM + " Items of the history are filtered. 6,040 users, 3,706 items: of 90 of "
        "them only rows without a time are known, which nothing is learned of.",
        cells=(*counted(ds), *first, *once, *more, *_ingredients(ds)),
        tables=(
            Table(columns=RANK_COLUMNS | COSTS, published=PUBLISHED_ML_1M),
            Table(
                title="What each ingredient gives: HSTU (2 layers) with one thing changed",
                group="ingredients",
                columns=RANK_COLUMNS | COSTS,
            ),
        ),
        plot=Plot(kind="bars", y=("hr_at_10", "ndcg_at_10")),
        targets=(
            Target(label="HSTU", figure="hr_at_10", value=0.3226, within=STANDARD_ERROR),
            Target(label="HSTU", figure="ndcg_at_10", value=0.1880, within=STANDARD_ERROR),
            Target(label="HSTU-large", figure="hr_at_10", value=0.3642, within=STANDARD_ERROR),
            Target(label="HSTU-large", figure="ndcg_at_10", value=0.2164, within=STANDARD_ERROR),
            Target(label="HSTU-large + features", figure="hr_at_10", value=0.37),
            Target(label="HSTU-large + features", figure="ndcg_at_10", value=0.22),
        ),
    )


def _ingredients(ds: str) -> list[Cell]:
    """Return HSTU with one choice of its recipe undone, or one of those of HSTU-large with features added."""
    base = named("ml_1m", "retrieval")
    authors = {
        "learning_rate": 1e-3,
        "batch_size": 128,
        "schedule": "constant",
        "max_epochs": 101,
        "patience": 20,
        "windows": "last",
    }
    features = named("ml_1m_features", "retrieval").model
    read = replace(base.model, item_features=features.item_features, user_features=features.user_features)
    changed = {
        "authors": ("the authors' training: batches of 128, rate .001, last 200", base.with_training(**authors)),
        "slower": ("learning rate .001", base.with_training(learning_rate=1e-3)),
        "last-windows": ("the last 200 events of a history alone", base.with_training(windows="last")),
        "shared": ("1,024 negatives a step", base.with_training(negatives="shared", num_negatives=1024)),
        "more-negatives": ("512 negatives a target", base.with_training(num_negatives=512)),
        "all-items": ("softmax over all items", base.with_training(negatives="all")),
        "features": ("genres, gender, age, occupation", replace(base, name="ml_1m-features", model=read)),
        "no-ratings": ("no ratings in the tokens", replace(base, model=replace(base.model, use_actions=False))),
    }
    return [
        Cell(name=name, label=label, dataset=ds, recipe=recipe, group="ingredients", minutes=20.0)
        for name, (label, recipe) in changed.items()
    ]


def retailrocket() -> Experiment:
    """Return multi-action retrieval and ranking on Retailrocket."""
    ds = "retailrocket"

    def cell(name: str, label: str, recipe: str, kind: Kind, **training: Any) -> Cell:
        changed = named(recipe, kind).with_training(**training)
        return Cell(name=name, label=label, dataset=ds, recipe=changed, group=kind)

    return Experiment(
        name="retailrocket",
        title="Retailrocket",
        question=(
            "With views, carts and purchases in one sequence: does a generative recommender beat counting and SASRec "
            "at retrieval, and a DLRM, which is told how often a user met an item, at ranking?"
        ),
        protocol=LAST_ITEM + " Seen items stay in the list: most purchases repeat one. Ranking: normalised entropy "
        "(below 1 beats the base rate) and AUC of cart and buy at each user's last event, whatever it was. The file "
        "holds one event for each (user, item, action), so what a user did with an item before nearly settles what "
        "comes next: of last events on items that were viewed, then put in the cart, all 573 are purchases.",
        cells=(
            *counted(ds, group="retrieval"),
            cell("hstu", "GR (HSTU)", "retailrocket", "retrieval"),
            cell("ranking-hstu", "GR (HSTU)", "retailrocket", "ranking"),
            cell("ranking-dlrm", "DLRM", "retailrocket-dlrm", "ranking"),
            cell("ranking-start", "GR, independent start", "retailrocket", "ranking", start="independent"),
            cell("ranking-learned", "GR, items learned", "retailrocket", "ranking", table_optimizer="adamw"),
            cell(
                "ranking-dlrm-learned", "DLRM, items learned", "retailrocket-dlrm", "ranking", table_optimizer="adamw"
            ),
            cell("sasrec", "SASRec", "retailrocket-sasrec", "retrieval"),
        ),
        tables=(
            Table(title="Retrieval", group="retrieval", columns=RANK_COLUMNS),
            Table(
                title="Ranking",
                group="ranking",
                columns={
                    "ne_cart": "cart NE",
                    "auc_cart": "cart AUC",
                    "ne_buy": "buy NE",
                    "auc_buy": "buy AUC",
                    "mean_ne": "mean NE",
                },
            ),
        ),
        plot=Plot(kind="bars", y=("hr_at_10", "ndcg_at_10"), group="retrieval"),
    )


def amazon_sports() -> Experiment:
    """Return retrieval on Amazon Sports."""
    ds = "amazon-sports"
    return Experiment(
        name="amazon_sports",
        title="Amazon Sports and Outdoors",
        question="What is left of the gain where histories are short (8 events) and times are whole days?",
        protocol=LAST_ITEM + " Items of the history are filtered. 5-core, 35,598 users, 18,357 items.",
        cells=(
            *counted(ds),
            Cell(name="hstu", label="HSTU", dataset=ds, recipe=named("amazon_sports", "retrieval")),
            Cell(name="sasrec", label="SASRec", dataset=ds, recipe=named("amazon_sports-sasrec", "retrieval")),
        ),
        tables=(Table(columns=RANK_COLUMNS),),
        plot=Plot(kind="bars", y=("hr_at_10", "ndcg_at_10")),
    )


def counted(dataset: str, group: str = "main") -> tuple[Cell, Cell]:
    """Return the cells of the baselines that are counted, not trained."""
    return (
        Cell(name="popularity", label="popularity", dataset=dataset, protocol="popularity", group=group, minutes=0.2),
        Cell(
            name="cooccurrence",
            label="item co-occurrence",
            dataset=dataset,
            protocol="cooccurrence",
            group=group,
            minutes=0.5,
        ),
    )


def _published(label: str, **figures: float) -> Published:
    return Published(label=label, figures=figures)


PUBLISHED_ML_1M = (
    _published(
        "SASRec (2023), paper",
        hr_at_10=0.2853,
        hr_at_50=0.5474,
        hr_at_200=0.7528,
        ndcg_at_10=0.1603,
        ndcg_at_200=0.2498,
    ),
    _published("BERT4Rec, quoted by the paper", hr_at_10=0.2843, ndcg_at_10=0.1537),
    _published("GRU4Rec, quoted by the paper", hr_at_10=0.2811, ndcg_at_10=0.1648),
    _published(
        "HSTU, paper (best epoch)",
        hr_at_10=0.3097,
        hr_at_50=0.5754,
        hr_at_200=0.7716,
        ndcg_at_10=0.1720,
        ndcg_at_200=0.2606,
    ),
    _published(
        "HSTU-large, paper (best epoch)",
        hr_at_10=0.3294,
        hr_at_50=0.5935,
        hr_at_200=0.7839,
        ndcg_at_10=0.1893,
        ndcg_at_200=0.2771,
    ),
    _published(
        "RecTools HSTU, stable sort",
        hr_at_10=0.3226,
        hr_at_50=0.5894,
        hr_at_200=0.7856,
        ndcg_at_10=0.1880,
        ndcg_at_200=0.2769,
    ),
    _published(
        "RecTools HSTU-large, stable sort",
        hr_at_10=0.3642,
        hr_at_50=0.6194,
        hr_at_200=0.8031,
        ndcg_at_10=0.2164,
        ndcg_at_200=0.3015,
    ),
)
