"""The language model of an instance: found, loaded, and given memory for its keys and values."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch

from common.engine import Engine
from common.language.settings import LanguageSettings
from common.mempool.pool import MemPool
from common.mempool.tiers import Tier
from common.messages.cluster import LanguageModelInfo
from common.models.causal_lm import KVPool, ModelLoadError, load
from common.runtime.process import CannotServe

_DEMO = "demo"
_DEMO_NAME = "triptych-demo-language"


@dataclass(frozen=True)
class LoadedModel:
    """An engine that is ready for requests, and what the cluster is told of its model."""

    engine: Engine
    info: LanguageModelInfo


def load_model(settings: LanguageSettings, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """Raises: CannotServe: no such model, or no memory for one block; the message says what to change."""
    location = settings.language_model
    folder = str(files("common.models") / "demo_language" / "weights") if location == _DEMO else location
    try:
        model = load(folder, device, dtype)
    except ModelLoadError as error:
        raise CannotServe(f"TRIPTYCH_LANGUAGE_MODEL: {error}") from error
    try:
        pool = KVPool.of_bytes(model.layout, settings.kv_bytes, device)
    except ValueError as error:
        raise CannotServe(f"TRIPTYCH_KV_BYTES: {error}") from error
    memory = MemPool(settings.instance, Tier.over(pool.blocks))
    engine = Engine(model, pool, None, settings.chunk_tokens, settings.most_sequences, memory, settings.caching)
    return LoadedModel(engine, LanguageModelInfo(name=model_name(location), context_tokens=engine.context))


def model_name(location: str) -> str:
    """What clients call the model: a folder's own name, or the hub's."""
    if location == _DEMO:
        return _DEMO_NAME
    folder = Path(location)
    return folder.resolve().name if folder.is_dir() else location
