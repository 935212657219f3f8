"""The experiments on cost: one pass for all targets, quality bought with compute, encoders by length.

Invariant: cost is counted (FLOPs, tokens) and measured (seconds); compared costs are of one machine.
"""

from dataclasses import replace

from gr_platform.experiments.experiment import Cell, Experiment, Plot, Table
from gr_platform.models.config import Recipe
from gr_platform.models.recipes import named

EFFICIENCY_LENGTHS = (200, 512, 1024, 2048, 4096)
# (embedding_dim, layers, heads, minutes expected)
SIZES = ((16, 1, 1, 3.0), (32, 2, 1, 8.0), (64, 4, 2, 25.0), (128, 6, 4, 75.0))


def generative_training() -> Experiment:
    """Return generative against impression-level training."""
    steady = {"learning_rate": 1e-3, "schedule": "constant", "batch_size": 128, "windows": "last"}
    base = named("ml_1m", "retrieval").with_training(**steady)
    smoke = {"num_steps": 4, "segment": 2, "max_users": 50}
    # 47 batches of 128 users are an epoch.
    generative = {"examples": "generative", "num_steps": 1_410, "segment": 47, "max_users": 2_000, "smoke": smoke}
    impressions = {"examples": "impressions", "num_steps": 4_700, "segment": 235, "max_users": 2_000, "smoke": smoke}
    return Experiment(
        name="generative_training",
        title="Generative against impression-level training",
        question="What does one target a forward pass cost against all targets of a user in one, for the same quality?",
        protocol=(
            "The same model, loss and batch of 128 sequences. Generative: whole users, each event a target. "
            "Impression-level: (user, position) drawn evenly from the training events, the history before it encoded "
            "for that one target. NDCG@10 on 2,000 validation users after every segment; no test event is read. Same "
            "quality: the best that impression-level training reached within its steps."
        ),
        cells=(
            Cell(
                name="generative",
                label="generative",
                dataset="ml-1m",
                protocol="examples",
                recipe=base,
                options=generative,
                minutes=10.0,
            ),
            Cell(
                name="impressions",
                label="impression-level",
                dataset="ml-1m",
                protocol="examples",
                recipe=base,
                options=impressions,
                minutes=25.0,
            ),
        ),
        tables=(
            Table(
                columns={
                    "validation_ndcg_at_10": "validation NDCG@10",
                    "steps": "steps",
                    "num_targets": "targets",
                    "train_tokens": "tokens",
                    "train_seconds": "seconds",
                    "train_flops": "FLOPs",
                }
            ),
        ),
        plot=Plot(kind="curves", x="seconds", y=("ndcg_at_10",), log_x=True),
        derived="same_quality",
    )


def scaling() -> Experiment:
    """Return four sizes of the ranking model: quality against compute."""
    base = named("ml_1m", "ranking").with_training(refit=False)
    cells = []
    for dim, layers, heads, minutes in SIZES:
        recipe = sized(base, dim, layers, heads)
        label = f"d {dim}, {layers} layer{'s' if layers > 1 else ''}"
        cells.append(Cell(name=f"{dim}x{layers}", label=label, dataset="ml-1m", recipe=recipe, minutes=minutes))
    return Experiment(
        name="scaling",
        title="Scaling",
        question="Does the quality of the ranking model follow a power law in training compute?",
        protocol="Ranking of ML-1M (like: four or five stars) at each user's last event; the epoch is chosen on the "
        "log loss of the next-to-last. Compute is the FLOPs of all epochs trained. Four sizes, one seed.",
        cells=tuple(cells),
        tables=(
            Table(
                columns={
                    "num_parameters": "parameters",
                    "train_flops": "FLOPs",
                    "train_seconds": "seconds",
                    "validation_log_loss": "validation log loss",
                    "mean_log_loss": "test log loss",
                    "mean_ne": "test NE",
                    "mean_auc": "test AUC",
                }
            ),
        ),
        plot=Plot(kind="points", x="train_flops", y=("mean_log_loss",), log_x=True, log_y=True),
        derived="scaling",
    )


def sized(base: Recipe, dim: int, layers: int, heads: int) -> Recipe:
    """Return the recipe with a model of another size."""
    wide = dim // heads
    model = replace(base.model, embedding_dim=dim, num_layers=layers, num_heads=heads, qk_dim=wide, v_dim=wide)
    return replace(base, name=f"{base.name}-{dim}x{layers}", model=model)


def encoder_efficiency() -> Experiment:
    """Return HSTU against Transformer++ of equal size: time and memory by length."""
    variants = {
        "hstu": "HSTU",
        "transformer": "Transformer++",
        "transformer-as-many-weights": "Transformer++ of as many weights",
    }
    options = {
        "lengths": EFFICIENCY_LENGTHS,
        "own_process": True,
        "smoke": {"batch_tokens": 32, "repeats": 1, "own_process": False, "lengths": EFFICIENCY_LENGTHS[:1]},
    }

    def columns(figure: str) -> dict[str, str]:
        return {f"{figure}_{length}": f"{length} tokens" for length in EFFICIENCY_LENGTHS}

    return Experiment(
        name="encoder_efficiency",
        title="Encoder efficiency",
        question="At equal size, what do HSTU and Transformer++ take to train and to infer as sequences grow?",
        protocol=(
            "Encoders alone, width 256, 2 layers, 4 heads, about 8,192 tokens a batch (one user at least), one thread, "
            "each length in a process of its own; median of three. Peak memory: how far the process grew above the one "
            "with the model in it. The paper has figures of GPUs alone."
        ),
        cells=tuple(
            Cell(
                name=name,
                label=label,
                dataset="",
                protocol="encoders",
                options={"variant": label, **options},
                minutes=2.0,
            )
            for name, label in variants.items()
        ),
        tables=(
            Table(title="Training step, ms", columns={"num_parameters": "weights", **columns("train_ms")}),
            Table(title="Inference, ms", columns=columns("infer_ms")),
            Table(title="Training step, peak MB", columns=columns("train_mb")),
            Table(title="Inference, peak MB", columns=columns("infer_mb")),
        ),
        plot=Plot(kind="curves", x="length", y=("train_ms", "infer_ms", "train_mb"), log_x=True, log_y=True),
    )
