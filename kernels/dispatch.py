"""Which implementation of an op runs, and the checks that come before it.

Invariant: the device of the tensors chooses (CUDA and ROCm: triton, everything else: cpu) unless `backend` says
otherwise; arguments are refused here, before anything is launched.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar, get_args

import torch
from torch import Tensor

Backend = Literal["reference", "triton", "cpu"]
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Return whether Triton kernels run in its interpreter: decided when they are imported, by TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose(backend: Backend | None, x: Tensor) -> Backend:
    """Return the backend that an op called with `x` uses. Raises ValueError if `backend` is unknown or cannot run."""
    if backend is None:
        return "triton" if x.is_cuda else "cpu"
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}, must be one of {', '.join(get_args(Backend))}")
    if backend == "triton" and not x.is_cuda and not interpreted():
        raise ValueError(f"backend 'triton' needs tensors on a GPU, got {x.device}; leave it out, or use 'cpu'")
    if backend == "cpu" and x.is_cuda:
        raise ValueError(f"backend 'cpu' needs tensors on the CPU, got {x.device}; leave it out, or move them")
    return backend


def traced_or_cast(x: Tensor) -> bool:
    """Return whether only the registered op will do: in a graph, on meta tensors, where autocast would interfere."""
    return torch.compiler.is_compiling() or x.is_meta or torch.is_autocast_enabled(x.device.type)


P = ParamSpec("P")
R = TypeVar("R")


def outside_autocast(op: Callable[P, R]) -> Callable[P, R]:
    """Return `op` with autocast off: an op keeps the dtypes it was given, inside too."""

    @functools.wraps(op)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[0]
        with torch.autocast(first.device.type, enabled=False):
            return op(*args, **kwargs)

    return run


def warps(wanted: int, *, amd: bool) -> int:
    """Return the warps of a launch: at most 4 of AMD's 64-wide ones, or its registers are cut to 256 and spill."""
    return min(wanted, 4) if amd else wanted


def require(holds: bool, argument: str, got: object, rule: str) -> None:
    """Raise ValueError naming the argument, what it is and what it must be, unless `holds`."""
    if not holds:
        raise ValueError(f"{argument} is {got}, must be {rule}")


def require_tensor(
    argument: str,
    x: Tensor,
    *,
    shape: tuple[int | None, ...],
    like: Tensor | None = None,
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = None,
) -> None:
    """Raise ValueError unless `x` has this shape (None: any), dtype, the device of `like` and a contiguous last dim."""
    # `in` would compare symbolic sizes by identity while a graph is traced.
    fits = x.dim() == len(shape) and all(
        want is None or want == have for want, have in zip(shape, x.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        require(False, f"shape of {argument}", list(x.shape), f"[{wanted}]")
    if dtype is not None:
        allowed = dtype if isinstance(dtype, tuple) else (dtype,)
        require(x.dtype in allowed, f"dtype of {argument}", x.dtype, " or ".join(map(str, allowed)))
    if like is not None:
        require(x.device == like.device, f"device of {argument}", x.device, f"{like.device}, as the other arguments")
    inner = x.stride(-1) if x.dim() and x.shape[-1] > 1 else 1
    require(inner == 1, f"stride of {argument}", x.stride(), "1 in the last dimension; pass a contiguous tensor")
