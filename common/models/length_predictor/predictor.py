"""The predictor as an instance uses it: loaded from the main model's folder, one prompt at a time."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.mempool.address import TOKEN_BYTES
from common.messages.chat import unpack_tokens
from common.models.length_predictor.network import LengthNetwork, NetworkShape
from common.policies.language.length_prediction import LengthBuckets, LengthRange

FOLDER = "length_predictor"
"""Its name in the main model's folder."""
CONFIG, WEIGHTS = "config.json", "model.safetensors"
_SOURCE = "predictor"


class PredictorLoadError(Exception):
    """The main model has no predictor that can be read; the message says what to change."""


class LengthPredictor:
    """Gives each range of answer lengths its probability.

    Attributes:
        buckets: the ranges.
        temperature: logits are divided by it, which makes probabilities true (Guo et al., 2017).
    """

    def __init__(self, network: LengthNetwork, buckets: LengthBuckets, temperature: float = 1.0) -> None:
        if network.shape.classes != buckets.buckets:
            raise ValueError(f"a network of {network.shape.classes} classes does not fit {buckets.buckets} ranges")
        self._network = network.eval()
        self.buckets = buckets
        self.temperature = temperature

    @staticmethod
    def folder(model_folder: str | Path) -> Path:
        """Where the predictor of the main model in a folder lies."""
        return Path(model_folder) / FOLDER

    @property
    def window(self) -> int:
        """Of a prompt it reads the last so many tokens."""
        return self._network.shape.window

    @property
    def parameters(self) -> int:
        """How many numbers it has learnt."""
        return sum(one.numel() for one in self._network.parameters())

    @classmethod
    def load(cls, model_folder: str | Path) -> "LengthPredictor":
        """The predictor of the main model in a folder.

        Raises:
            PredictorLoadError: there is none, or it is damaged.
        """
        folder = cls.folder(model_folder)
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            network = LengthNetwork(NetworkShape(**config["network"]))
            state = load_file(folder / WEIGHTS)
            network.load_state_dict({name: value.float() for name, value in state.items()})
            return cls(network, LengthBuckets(**config["buckets"]), float(config["temperature"]))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise PredictorLoadError(
                f"{folder}: no length predictor that can be read ({error}): train one with "
                "python -m common.models.length_predictor.train"
            ) from error

    def save(self, model_folder: Path) -> None:
        """Write it into a main model's folder, weights in half precision."""
        folder = self.folder(model_folder)
        folder.mkdir(exist_ok=True)
        state = {name: value.half().contiguous() for name, value in self._network.state_dict().items()}
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        config = {
            "network": asdict(self._network.shape),
            "buckets": asdict(self.buckets),
            "temperature": self.temperature,
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

    def predict(self, prompt: bytes) -> list[float]:
        """The probability of each range, for a prompt's packed tokens (``common.messages.chat.pack_tokens``).

        Raises:
            ValueError: it has no tokens, or is not packed.
        """
        tokens = unpack_tokens(prompt[-TOKEN_BYTES * self.window :])
        if not tokens:
            raise ValueError("a prompt has at least one token")
        read = torch.tensor([tokens])
        with torch.inference_mode():
            logits: Tensor = self._network(read, torch.ones_like(read, dtype=torch.bool))[0]
            probabilities: list[float] = (logits / self.temperature).softmax(0).tolist()
        return probabilities

    def range(self, prompt: bytes) -> LengthRange:
        """The likeliest range. Raises: ValueError: see ``predict``."""
        probabilities = self.predict(prompt)
        return self.buckets.range(probabilities.index(max(probabilities)), _SOURCE)
