"""A bundle's weights as a torch model: the path that computes several users a step, on the CPU or a GPU.

Invariant: torch is imported with this module alone, so a server that runs the graphs never pays for it.
"""

from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from gr_platform import settings
from gr_platform.errors import UserError
from gr_platform.models.build import build_model
from gr_platform.models.compute import TorchCompute
from gr_platform.models.features import FeatureTables

if TYPE_CHECKING:
    from gr_platform.bundle.load import Bundle


def torch_compute(
    bundle: "Bundle",
    num_pages: int,
    *,
    num_threads: int = 1,
    device: str | None = None,
    cache_dtype: torch.dtype | None = None,
) -> TorchCompute:
    """Return the bundle's model with room for `num_pages` pages; device: of GR_DEVICE if None.

    Sets the process's number of threads. Raises UserError if the weights do not fit the manifest.
    """
    torch.set_num_threads(num_threads)
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
    return TorchCompute(model.to(device or settings.device()), num_pages, cache_dtype=cache_dtype)
