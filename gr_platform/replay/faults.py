"""What can be wrong with the events of a day, planted on purpose.

Invariant: a fault is a function of the day, what was before it and a seed; the day's true events stay as they are.
"""

from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Fault = Literal["poisoned", "empty", "tenfold"]
DAY_MS = 86_400_000
POISONED_SHARE = 0.8
COPIES = 10


def poisoned(day: pa.Table, history: pa.Table, seed: int) -> pa.Table:
    """Return a day of which 80 % of the rows, drawn by `seed`, name one item that few had seen before."""
    rng = np.random.default_rng([seed, 1])
    counts = pc.value_counts(history["item_id"])
    order = np.argsort(counts.field("counts").to_numpy(), kind="stable")
    item = counts.field("values")[int(order[len(order) // 10])]
    struck = np.zeros(len(day), bool)
    struck[rng.permutation(len(day))[: round(POISONED_SHARE * len(day))]] = True
    items = pc.if_else(pa.array(struck), pa.scalar(item.as_py(), day["item_id"].type), day["item_id"])
    return day.set_column(day.column_names.index("item_id"), day.schema.field("item_id"), items)


def tenfold(day: pa.Table) -> pa.Table:
    """Return a day of ten times the users, each of whom does what one of the day's did, some seconds later."""
    users, times = day["user_id"], day["event_ts"].to_numpy()
    end = (times.max(initial=0) // DAY_MS + 1) * DAY_MS
    copies = [day]
    for copy in range(1, COPIES):
        others = (
            pc.add(users, copy * 1_000_000_000)
            if pa.types.is_integer(users.type)
            else pc.binary_join_element_wise(users, str(copy), "~")
        )
        later = pa.array(np.minimum(times + 1_000 * copy, end - 1))
        copy_of = day.set_column(day.column_names.index("user_id"), day.schema.field("user_id"), others)
        copies.append(copy_of.set_column(day.column_names.index("event_ts"), day.schema.field("event_ts"), later))
    joined = pa.concat_tables(copies)
    return joined.take(pa.array(np.argsort(joined["event_ts"].to_numpy(), kind="stable")))
