"""RowwiseAdamW: the optimiser of embedding tables, for dense gradients and for sparse ones of the touched rows.

Invariant: a run resumed from `state_dict` goes on bit for bit.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import Backend, require
from kernels.rowwise_adamw.op import check_hyperparameters, rowwise_adamw_


class RowwiseAdamW(torch.optim.Optimizer):
    """AdamW with one second moment a row, for parameters [V, d] in fp32 (fp64 on the CPU).

    A dense gradient touches every row; a sparse COO gradient (nn.Embedding(sparse=True)) is coalesced and touches the
    rows it names: no other row decays or moves. Weights in 16 bit are refused: a step is mostly below half their last
    bit, and a loaded state would be rounded to their dtype. How rare rows are corrected: see `rowwise_adamw_`.
    Raises ValueError naming the argument. Source: PAPER section 2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        backend: Backend | None = None,
    ) -> None:
        self.backend = backend
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Raises ValueError unless its numbers are in range and its parameters are tables."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_hyperparameters(group["lr"], group["betas"], group["eps"], group["weight_decay"])
            for table in group["params"]:
                require(table.dim() == 2 and table.shape[1] > 0, "shape of a parameter", list(table.shape), "[V, d]")
                dtypes = (torch.float32, torch.float64)
                require(table.dtype in dtypes, "dtype of a parameter", table.dtype, " or ".join(map(str, dtypes)))
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step for every parameter that has a gradient; return the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            numbers = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
            for table in group["params"]:
                if table.grad is not None:
                    grad = table.grad if table.grad.is_sparse else table.grad.contiguous()
                    self._update(table, grad, numbers)
        return loss

    def _update(self, table: Tensor, grad: Tensor, numbers: dict[str, Any]) -> None:
        state = self.state[table]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(table, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = table.new_zeros(len(table))
        rows = None
        if grad.is_sparse:
            grad = grad.coalesce()
            require(grad.sparse_dim() == 1, "sparse dimensions of a gradient", grad.sparse_dim(), "1: the table's rows")
            rows, grad = grad.indices()[0], grad.values()
        state["step"] += 1
        moments = (state["exp_avg"], state["exp_avg_sq"])
        rowwise_adamw_(table, *moments, rows, grad, state["step"], **numbers, backend=self.backend)
