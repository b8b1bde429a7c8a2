"""Open-Sora 1.2 (STDiT3, its video autoencoder, rectified flow), key for key as its checkpoints were published."""

from common.models.opensora.rectified_flow import RectifiedFlow
from common.models.opensora.stdit3 import PreparedText, STDiT3, STDiT3Config
from common.models.opensora.vae import OpenSoraVAE, OpenSoraVAEConfig

__all__ = ["OpenSoraVAE", "OpenSoraVAEConfig", "PreparedText", "RectifiedFlow", "STDiT3", "STDiT3Config"]
