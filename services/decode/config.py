"""The decode process's settings."""

from typing import Literal

from common.language.settings import LanguageSettings


class DecodeSettings(LanguageSettings):
    """``role``: ``decode`` goes on with what others have prefilled; ``fused`` prefills too."""

    role: Literal["fused", "decode"] = "fused"
