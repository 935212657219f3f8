"""AdamW for embedding tables: one second moment a row, and only the rows that have a gradient are touched."""

from kernels.rowwise_adamw.op import rowwise_adamw_
from kernels.rowwise_adamw.optimizer import RowwiseAdamW

__all__ = ["RowwiseAdamW", "rowwise_adamw_"]
