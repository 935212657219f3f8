"""A GPU that is not there: tensors that say they are on the device `pretended` and compute on the CPU.

Invariant: what a GPU refuses is refused: an operation on tensors of both sides (numbers without a dimension apart) and
numpy's view of a tensor that was not brought back. Values are the CPU's, so figures must be those of a run there, up to
the rounding of what torch does in other steps; kernels run as on the CPU. What it cannot show: autocast, the Triton
kernels, nccl, and speed.

Importing this registers the device for the whole process and for good, so its tests (device_cases.py) have a process of
their own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from gr_platform.models import batch as batch_module
from kernels import JaggedTimes
from kernels.norm_gate import op as norm_gate
from kernels.uvqk import op as uvqk

NAME = "pretended"
COPY, NUMBER = torch.ops.aten.copy_.default, torch.ops.aten._local_scalar_dense.default
MOVES = (COPY, torch.ops.aten._to_copy.default)


class There(Tensor):
    """A tensor on the device; `held`: its values."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "There":
        place = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        tensor = Tensor._make_wrapper_subclass(cls, held.size(), device=torch.device(NAME, 0), **place)
        tensor.held = held
        return tensor

    def tolist(self) -> Any:
        """Return the values, which torch brings back by itself; it refuses to for subclasses."""
        return self.held.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"There({self.held})"

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(op, args, kwargs or {})


class _Everywhere(TorchDispatchMode):
    """Sees operations without a tensor of the device too: those that make one."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(op, args, kwargs or {})


def computed(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return the result of an operation, on the side of its tensors or on that asked for. Raises RuntimeError."""
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    there = {id(each.held): each for each in tensors if isinstance(each, There)}
    here = [tuple(each.shape) for each in tensors if not isinstance(each, There) and each.dim()]
    if there and here and op not in MOVES:
        raise RuntimeError(f"{op} got tensors of shape {here} on the CPU beside others on the device")
    device = kwargs.get("device")
    goes_there = bool(there) if device is None else torch.device(device).type == NAME
    if op is COPY:
        goes_there = isinstance(args[0], There)
    if device is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    args, kwargs = tree_map_only(There, lambda each: each.held, (args, kwargs))
    out = op(*args, **kwargs)
    if not goes_there or op is NUMBER:
        return out
    # An operation in place gives back the tensor that it was given.
    return tree_map_only(Tensor, lambda each: there[id(each)] if id(each) in there else There(each), out)


class Module(backend_registration._DummyBackendModule):
    """`torch.pretended`; generator: what its random numbers would come from, as a number that seeds change."""

    generator = 0

    def manual_seed_all(self, seed: int) -> None:
        self.generator = seed

    def get_rng_state(self, device: object) -> int:
        return self.generator

    def set_rng_state(self, state: int, device: object) -> None:
        self.generator = state

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def _jagged(*tensors: Tensor) -> JaggedTimes:
    """Return `JaggedTimes.of` as on the CPU, whose plan of the work is another than a GPU's."""
    if not isinstance(tensors[0], There):
        return JaggedTimes.of(*tensors)
    assert all(isinstance(each, There) for each in tensors)
    made = JaggedTimes.of(*(each.held for each in tensors))
    values = {each.name: getattr(made, each.name) for each in fields(made)}
    return replace(made, **{name: There(value) for name, value in values.items() if isinstance(value, Tensor)})


class _Jagged:
    of = staticmethod(_jagged)


# Torch holds no reference to them. Before any backward: autograd counts the devices at the first one.
_PARTS = (Module(), backend_registration._DummyPrivateUse1Hook(), backend_registration._DummyDeviceGuard())
backend_registration._setup_privateuseone_for_python_backend(NAME, *_PARTS)


@contextmanager
def pretended_gpu() -> Iterator[Module]:
    """Let tensors be moved to `pretended` inside a `with`; yield the module of the device."""
    # Else what `torch.tensor(..., device=...)` makes passes the mode by.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        # A thread for the device, as autograd has one, ends the process: it calls the parts of Python without its lock.
        one_thread = torch.autograd.set_multithreading_enabled(False)
        with pytest.MonkeyPatch.context() as patched, one_thread, _Everywhere():
            patched.setattr(batch_module, "JaggedTimes", _Jagged)
            # Tensors of Python's cannot be made in inference mode from others.
            patched.setattr(torch._C, "_InferenceMode", lambda mode: torch.no_grad())
            # Registered ops alone are seen as one operation: without gradients some are left out on the CPU.
            for module in (norm_gate, uvqk):
                patched.setattr(module, "traced_or_cast", lambda x: True)
            yield _PARTS[0]
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
