"""A bundle's weights as a torch model: several users a step, on the CPU or a GPU.

Invariant: torch is imported with this module alone, so a server that runs the graphs never pays for it.
"""

from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from gr_platform import settings
from gr_platform.bundle.compute import CacheType
from gr_platform.errors import UserError
from gr_platform.models.build import build_model
from gr_platform.models.compute import TorchCompute
from gr_platform.models.features import FeatureTables

if TYPE_CHECKING:
    from gr_platform.bundle.load import Bundle

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def torch_compute(
    bundle: "Bundle",
    num_pages: int,
    *,
    num_threads: int = 1,
    cache_dtype: CacheType = "fp32",
) -> TorchCompute:
    """Return the bundle's model with room for `num_pages` pages, on the device of GR_DEVICE.

    Sets the process's number of threads. Raises UserError if the weights do not fit the manifest, and for a short
    cache_dtype on a CPU, which computes those slowly.
    """
    torch.set_num_threads(num_threads)
    device = settings.device()
    if device == "cpu" and cache_dtype != "fp32":
        raise UserError(f"cache_dtype is {cache_dtype}, which is for a GPU, and there is none; set it to fp32")
    try:
        state = load_file(bundle.folder / "model.safetensors")
        model = build_model(
            bundle.config,
            num_rows=bundle.vocabulary.num_rows,
            num_actions=len(bundle.declaration.actions),
            tasks=list(bundle.tasks),
            features=FeatureTables.of_state(bundle.config, state),
        )
        model.load_state_dict(state)
    except (SafetensorError, RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the weights of bundle {bundle.folder.name} do not fit it ({reason}); export it again"
        ) from None
    return TorchCompute(model.to(device), num_pages, cache_dtype=_DTYPES[cache_dtype])
