"""The language model of an instance: found, loaded, and given memory for its keys and values."""

import hashlib
from dataclasses import dataclass
from importlib.resources import files

import structlog
import torch

from common.engine import Engine
from common.language.settings import DEMO, KVStore, LanguageSettings, model_name
from common.mempool.address import BLOCK_TOKENS
from common.mempool.pool import MemPool
from common.mempool.tiers import Tier, disk_tier, dram_tier
from common.messages.cluster import LanguageModelInfo
from common.models.causal_lm import CausalLM, KVPool, ModelLoadError, load, weights_digest
from common.models.length_predictor import AnswerLengths, PredictorLoadError
from common.policies.language.length_prediction import LengthBuckets
from common.runtime.process import CannotServe

log = structlog.get_logger()


@dataclass(frozen=True)
class LoadedModel:
    """An engine that is ready for requests, how long its answers will be, and what the cluster is told of its model.

    ``namespace``: of its keys and values in the cache stores; empty where nothing goes there.
    """

    engine: Engine
    lengths: AnswerLengths
    info: LanguageModelInfo
    namespace: str = ""


def open_model(settings: LanguageSettings, device: torch.device, dtype: torch.dtype) -> tuple[CausalLM, KVPool]:
    """The model, and memory for its keys and values.

    Raises:
        CannotServe: no such model, or no memory for one block; the message says what to change.
    """
    try:
        model = load(_location(settings), device, dtype)
    except ModelLoadError as error:
        raise CannotServe(f"TRIPTYCH_LANGUAGE_MODEL: {error}") from error
    try:
        return model, KVPool.of_bytes(model.layout, settings.kv_bytes, device)
    except ValueError as error:
        raise CannotServe(f"TRIPTYCH_KV_BYTES: {error}") from error


def load_model(settings: LanguageSettings, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """Raises: CannotServe: see ``open_model``; or its length predictor is damaged."""
    model, pool = open_model(settings, device, dtype)
    memory = MemPool(settings.instance, Tier.over(pool.blocks), _colder(settings, pool))
    engine = Engine(
        model,
        pool,
        None,
        settings.chunk_tokens,
        settings.batch_sequences,
        memory,
        settings.caching,
        settings.batching_rules,
    )
    try:
        lengths = AnswerLengths.of_model(_location(settings), LengthBuckets())
    except PredictorLoadError as error:
        raise CannotServe(f"TRIPTYCH_LANGUAGE_MODEL: {error}") from error
    name = model_name(settings.language_model)
    log.info("lengths of answers", model=name, by="histogram" if lengths.predictor is None else "predictor")
    room = memory.hbm.allocator.blocks * BLOCK_TOKENS
    info = LanguageModelInfo(name=name, context_tokens=engine.context, kv_tokens=room)
    return LoadedModel(engine, lengths, info, _namespace(settings, pool))


def _namespace(settings: LanguageSettings, pool: KVPool) -> str:
    """Says the weights, and all else on which the bytes of a block depend; but not what rounding depends on beside."""
    if settings.kv_store is KVStore.OFF or not settings.caching.keeps_computed:
        return ""
    blocks = pool.blocks
    kind = f"{tuple(blocks.shape[1:])} {blocks.dtype} {blocks.device.type}"
    hashed = hashlib.sha256(f"{weights_digest(_location(settings))} {kind}".encode())
    return f"kv/{hashed.hexdigest()[:32]}"


def _location(settings: LanguageSettings) -> str:
    """A folder, or a repository of the hub: that has no length predictor."""
    if settings.language_model == DEMO:
        return str(files("common.models") / "demo_language" / "weights")
    return settings.language_model


def _colder(settings: LanguageSettings, pool: KVPool) -> list[Tier]:
    """Raises: CannotServe: there is no room on the disk."""
    try:
        disk = disk_tier(pool.blocks, settings.kv_disk_bytes, settings.kv_disk_folder)
    except OSError as error:
        raise CannotServe(f"TRIPTYCH_KV_DISK_BYTES, TRIPTYCH_KV_DISK_FOLDER: {error}") from error
    return [tier for tier in (dram_tier(pool.blocks, settings.kv_dram_bytes), disk) if tier is not None]
