"""The encoder's settings."""

from typing import Literal

from pydantic import Field

from common.runtime.settings import WorkerSettings


class EncoderSettings(WorkerSettings):
    """``remembered_prompts`` are kept encoded (least recently used goes first).

    ``share_prompts``: whether embeddings go to the cache stores too; ``auto`` where a fetch is cheaper than encoding.
    ``text_lease_s``: how long embeddings wait for their DiT worker.
    """

    remembered_prompts: int = Field(default=1024, ge=1)
    share_prompts: Literal["auto", "always", "never"] = "auto"
    text_lease_s: float = Field(default=600.0, gt=0)
