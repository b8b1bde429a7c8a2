"""The language model of an instance: found, loaded, and given memory for its keys and values."""

from dataclasses import dataclass
from importlib.resources import files

import torch

from common.engine import Engine
from common.language.settings import DEMO, LanguageSettings, model_name
from common.messages.cluster import LanguageModelInfo
from common.models.causal_lm import CausalLM, KVPool, ModelLoadError, load
from common.runtime.process import CannotServe


@dataclass(frozen=True)
class LoadedModel:
    """An engine that is ready for requests, and what the cluster is told of its model."""

    engine: Engine
    info: LanguageModelInfo


def open_model(settings: LanguageSettings, device: torch.device, dtype: torch.dtype) -> tuple[CausalLM, KVPool]:
    """The model, and memory for its keys and values.

    Raises:
        CannotServe: no such model, or no memory for one block; the message says what to change.
    """
    location = settings.language_model
    folder = str(files("common.models") / "demo_language" / "weights") if location == DEMO else location
    try:
        model = load(folder, device, dtype)
    except ModelLoadError as error:
        raise CannotServe(f"TRIPTYCH_LANGUAGE_MODEL: {error}") from error
    try:
        return model, KVPool.of_bytes(model.layout, settings.kv_bytes, device)
    except ValueError as error:
        raise CannotServe(f"TRIPTYCH_KV_BYTES: {error}") from error


def load_model(settings: LanguageSettings, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """Raises: CannotServe: see ``open_model``."""
    model, pool = open_model(settings, device, dtype)
    engine = Engine(model, pool, None, settings.chunk_tokens, settings.most_sequences)
    name = model_name(settings.language_model)
    return LoadedModel(engine, LanguageModelInfo(name=name, context_tokens=engine.context))
