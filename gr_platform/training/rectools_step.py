"""Times RecTools' HSTU training step; runs in that library's own environment and imports nothing of ours.

Invariant: all users form one batch, so an epoch is a step; what the data loader does before it is not counted.

    python3 -m venv PEERS && PEERS/bin/pip install torch==2.13.0 "rectools[torch]==0.19.0"
    GR_PEERS=PEERS gr bench train
"""

import json
import sys
import time
from typing import Any

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from rectools.dataset import Dataset
from rectools.models import HSTUModel


class Timer(Callback):
    """Seconds of every step: forward, loss, backward, optimizer."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.began = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self.began = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop it."""
        self.seconds.append(time.perf_counter() - self.began)


def main() -> None:
    """Print the seconds of each step as a JSON list: arguments are the interactions (.npz) and the shape (JSON)."""
    shape = json.loads(sys.argv[2])
    torch.set_num_threads(shape["num_threads"])
    seed_everything(0)
    with np.load(sys.argv[1], allow_pickle=False) as interactions:
        times = pd.to_datetime(interactions["times"], unit="ms")
        columns = {"user_id": interactions["users"], "item_id": interactions["items"], "weight": 1, "datetime": times}
        dataset = Dataset.construct(pd.DataFrame(columns))
    model = HSTUModel(
        session_max_len=shape["max_length"],
        loss="sampled_softmax",
        n_negatives=shape["num_negatives"],
        dropout_rate=shape["dropout"],
        n_factors=shape["embedding_dim"],
        n_heads=shape["num_heads"],
        n_blocks=shape["num_layers"],
        lr=shape["learning_rate"],
        batch_size=len(np.unique(columns["user_id"])),
        lightning_module_kwargs={"logits_t": shape["temperature"]},
        relative_time_attention=True,
        relative_pos_attention=True,
        get_trainer_func=lambda: Trainer(
            max_epochs=shape["num_steps"],
            callbacks=[Timer()],
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ),
    )
    model.fit(dataset)
    # The library trains with copies of the trainer and its callbacks.
    timer = next(found for found in model.fit_trainer.callbacks if isinstance(found, Timer))
    print(json.dumps(timer.seconds))


if __name__ == "__main__":
    main()
