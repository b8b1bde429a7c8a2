"""The classifier's network: embeddings of the prompt's last tokens, two convolutions, pooling, one hidden layer."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_NOWHERE = -1e9


@dataclass(frozen=True, slots=True)
class NetworkShape:
    """The sizes of a ``LengthNetwork``.

    Attributes:
        rows: of the table of embeddings; a token's row is its id modulo ``rows``.
        window: at most so many tokens are read, the prompt's last.
        width, channels, hidden: of embeddings, convolutions and the hidden layer.
        heads: in so many ways the tokens are weighted and summed.
        classes: how many ranges of lengths there are.
    """

    rows: int
    window: int
    classes: int
    width: int = 40
    channels: int = 96
    hidden: int = 64
    heads: int = 2


class LengthNetwork(nn.Module):
    """From tokens to one logit for each range of lengths. A prompt's logits do not depend on who is beside it."""

    def __init__(self, shape: NetworkShape) -> None:
        super().__init__()
        self.shape = shape
        self.tokens = nn.Embedding(shape.rows, shape.width)
        self.places = nn.Parameter(torch.zeros(shape.window, shape.width))
        self.near = nn.Conv1d(shape.width, shape.channels, kernel_size=3, padding=1)
        self.wide = nn.Conv1d(shape.channels, shape.channels, kernel_size=3, padding=1)
        self.weighting = nn.Linear(shape.channels, shape.heads)
        self.inner = nn.Linear((shape.heads + 1) * shape.channels, shape.hidden)
        self.out = nn.Linear(shape.hidden, shape.classes)

    def forward(self, tokens: Tensor, present: Tensor) -> Tensor:
        """Logits [B, classes].

        Args:
            tokens: int64 [B, T], T at most the window; prompts end at the right edge, so that a place counts from the
                end: there stands what is to be answered.
            present: bool [B, T], true where there is a token; at least one in every row.
        """
        mask = present.unsqueeze(1)
        read = self.tokens(tokens % self.shape.rows) + self.places[self.shape.window - tokens.shape[1] :]
        # Zeros beside the prompt, after each layer: as if nothing were there.
        near = nn.functional.gelu(self.near(read.transpose(1, 2) * mask)) * mask
        features = near + nn.functional.gelu(self.wide(near)) * mask
        weights = self.weighting(features.transpose(1, 2)).masked_fill(~present.unsqueeze(2), _NOWHERE).softmax(1)
        means = (features @ weights).flatten(1)
        peaks = features.masked_fill(~mask, _NOWHERE).amax(2)
        hidden = nn.functional.gelu(self.inner(torch.cat((means, peaks), 1)))
        logits: Tensor = self.out(hidden)
        return logits
