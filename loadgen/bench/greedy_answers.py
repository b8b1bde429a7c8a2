"""What a language model answers greedily by transformers' ``generate``: what a stack's answers are compared with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

# Logits of other batches and other pieces of a prompt differ by rounding, by some 1e-5 here; a token that is ahead of
# the next best by less than this may be another one.
_NEAR_TIE = 1e-3
_BATCH = 16
_NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Expected:
    """The text of an answer, up to the first token that is nearly a tie; ``whole``: there is none."""

    text: str
    whole: bool

    def agrees(self, text: str) -> bool:
        """Whether an answer is as expected, as far as it is known."""
        # The bytes of a character may have been cut in two.
        return text == self.text if self.whole else text.startswith(self.text.rstrip(_NO_CHARACTER))


class GreedyAnswers:
    """Computes them on the CPU, by a model in a local folder."""

    def __init__(self, folder: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def answers(self, asked: Sequence[tuple[Sequence[int], int]]) -> list[Expected]:
        """What follows each prompt, so many tokens of it, whatever they are."""
        # Prompts of about one length together: they are filled up to the longest.
        order = sorted(range(len(asked)), key=lambda place: len(asked[place][0]))
        found: dict[int, Expected] = {}
        for start in range(0, len(order), _BATCH):
            places = order[start : start + _BATCH]
            found |= dict(zip(places, self._batch([asked[place] for place in places]), strict=True))
        return [found[place] for place in range(len(asked))]

    def _batch(self, asked: Sequence[tuple[Sequence[int], int]]) -> list[Expected]:
        longest = max(len(prompt) for prompt, _ in asked)
        most = max(tokens for _, tokens in asked)
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt, _ in asked])
        there = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in asked])
        with torch.inference_mode():
            whole = self._model.generate(
                ids,
                attention_mask=there,
                min_new_tokens=most,
                max_new_tokens=most,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        best = torch.stack(whole.logits, dim=1).topk(2).values
        return [
            self._expected(whole.sequences[row, longest : longest + tokens], best[row, :tokens])
            for row, (_, tokens) in enumerate(asked)
        ]

    def _expected(self, tokens: torch.Tensor, best: torch.Tensor) -> Expected:
        ties = (best[:, 0] - best[:, 1] < _NEAR_TIE).nonzero()
        clear = int(ties[0]) if len(ties) else len(tokens)
        return Expected(self._tokenizer.decode(tokens[:clear].tolist(), skip_special_tokens=True), clear == len(tokens))
