"""Trains the classifier by cross-entropy, then sets the temperature that makes its probabilities true."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from common.messages.chat import unpack_tokens
from common.models.length_predictor.network import LengthNetwork, NetworkShape

Example = tuple[bytes, int]
"""A packed prompt and its class."""

_BATCH = 128
_SORTED = 16 * _BATCH
_LEARNING_RATE = 3e-3
_WEIGHT_DECAY = 0.05
_WARM_UP = 0.05
_UNREAD = 0.05
"""The share of tokens that training hides, so that none is relied on alone."""
_TEMPERATURES = tuple(0.5 * 1.05**step for step in range(50))


def train(examples: Sequence[Example], shape: NetworkShape, epochs: int, seed: int) -> LengthNetwork:
    """A network that has seen every example ``epochs`` times; one seed gives one network."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 3])
    network = LengthNetwork(shape)
    optimiser = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    steps = epochs * -(-len(examples) // _BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step / steps))
    for epoch in range(epochs):
        losses = []
        for batch in _batches(examples, rng):
            tokens, present = aligned([prompt for prompt, _ in batch], shape.window)
            read = present & (torch.rand(present.shape) >= _UNREAD)
            read[:, -1] = True
            logits = network(tokens, read)
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor([label for _, label in batch]))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            losses.append(float(loss.detach()))
        print(f"epoch {epoch + 1} of {epochs}: loss {np.mean(losses):.4f}", flush=True)
    return network.eval()


def best_temperature(network: LengthNetwork, examples: Sequence[Example]) -> float:
    """The temperature at which examples that were not trained on are likeliest (Guo et al., 2017)."""
    logits = torch.cat(
        [_logits(network, examples[start : start + _BATCH]) for start in range(0, len(examples), _BATCH)]
    )
    labels = torch.tensor([label for _, label in examples])
    return min(
        _TEMPERATURES, key=lambda temperature: float(torch.nn.functional.cross_entropy(logits / temperature, labels))
    )


def aligned(prompts: Sequence[bytes], window: int) -> tuple[Tensor, Tensor]:
    """(tokens int64 [B, T], present bool [B, T]): the last tokens of each prompt, at the right edge."""
    rows = [unpack_tokens(prompt)[-window:] for prompt in prompts]
    longest = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    present = torch.zeros(len(rows), longest, dtype=torch.bool)
    for number, row in enumerate(rows):
        tokens[number, longest - len(row) :] = torch.tensor(row)
        present[number, longest - len(row) :] = True
    return tokens, present


@torch.inference_mode()
def _logits(network: LengthNetwork, examples: Sequence[Example]) -> Tensor:
    logits: Tensor = network(*aligned([prompt for prompt, _ in examples], network.shape.window))
    return logits


def _batches(examples: Sequence[Example], rng: np.random.Generator) -> Iterator[list[Example]]:
    """All examples in random order, those of like length together: less is padding."""
    order = rng.permutation(len(examples))
    batches: list[list[Example]] = []
    for start in range(0, len(order), _SORTED):
        near = sorted((examples[number] for number in order[start : start + _SORTED]), key=lambda one: len(one[0]))
        batches += [near[first : first + _BATCH] for first in range(0, len(near), _BATCH)]
    for number in rng.permutation(len(batches)):
        yield batches[number]


def _rate(progress: float) -> float:
    """The learning rate's share: up in a line, down along a cosine."""
    return min(1.0, progress / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
