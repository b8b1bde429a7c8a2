"""The encoder's settings."""

from pydantic import Field

from common.runtime.settings import WorkerSettings


class EncoderSettings(WorkerSettings):
    """``remembered_prompts`` are kept encoded (least recently used goes first).

    ``text_lease_s``: how long embeddings wait for their DiT worker.
    """

    remembered_prompts: int = Field(default=1024, ge=1)
    text_lease_s: float = Field(default=600.0, gt=0)
