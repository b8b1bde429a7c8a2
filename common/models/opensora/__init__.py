"""Open-Sora 1.2 (STDiT3, its video autoencoder, rectified flow), key for key as its checkpoints were published.

Names are looked up when first used, so that a process which only reads a `VideoModelSpec` never loads torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.models.opensora.rectified_flow import RectifiedFlow
    from common.models.opensora.stdit3 import PreparedText, STDiT3, STDiT3Config
    from common.models.opensora.vae import OpenSoraVAE
    from common.models.opensora.vae_config import OpenSoraVAEConfig

__all__ = ["OpenSoraVAE", "OpenSoraVAEConfig", "PreparedText", "RectifiedFlow", "STDiT3", "STDiT3Config"]

_HOME = {
    "OpenSoraVAE": "vae",
    "OpenSoraVAEConfig": "vae_config",
    "PreparedText": "stdit3",
    "RectifiedFlow": "rectified_flow",
    "STDiT3": "stdit3",
    "STDiT3Config": "stdit3",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
