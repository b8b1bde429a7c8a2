"""Shared by the reference tests: one thread, and a whole small model on disk."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common.models.opensora import OpenSoraVAE, STDiT3
from common.models.opensora.spec import VideoModelSpec, load_spec
from tests.support import small_model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small_stdit3() -> STDiT3:
    return small_model.small_stdit3()


@pytest.fixture(scope="session")
def small_vae() -> OpenSoraVAE:
    return small_model.small_vae()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model.save_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def spec(model_folder: Path) -> VideoModelSpec:
    return load_spec(model_folder)
