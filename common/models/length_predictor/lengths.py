"""Says how long answers will be: by the model's own predictor, or by a running histogram where none is trained."""

from pathlib import Path

from common.messages.chat import tokens_in
from common.models.length_predictor.predictor import LengthPredictor
from common.policies.language.length_prediction import LengthBuckets, LengthHistogram, LengthRange, prompt_class


class AnswerLengths:
    """Which of the two has spoken, each ``LengthRange.source`` says.

    Attributes:
        predictor: None where the model has none.
        histogram: counts every answer that has ended, by the length of its prompt.
    """

    def __init__(self, predictor: LengthPredictor | None, histogram: LengthHistogram) -> None:
        self.predictor = predictor
        self.histogram = histogram

    @classmethod
    def of_model(cls, model_folder: str | Path, unknown: LengthBuckets, first_guess: int = 0) -> "AnswerLengths":
        """For the main model in a folder.

        Args:
            unknown: the histogram's ranges where there is no predictor; where there is, it has the predictor's.
            first_guess: how many tokens the histogram expects before it has counted any answer.

        Raises:
            PredictorLoadError: there is a predictor, but it is damaged.
        """
        if not LengthPredictor.folder(model_folder).is_dir():
            return cls(None, LengthHistogram(unknown, first_guess))
        predictor = LengthPredictor.load(model_folder)
        return cls(predictor, LengthHistogram(predictor.buckets, first_guess))

    def expect(self, prompt: bytes) -> LengthRange:
        """For a packed prompt. Raises: ValueError: it has no tokens."""
        if self.predictor is not None:
            return self.predictor.range(prompt)
        return self.counted(tokens_in(prompt))

    def counted(self, prompt_tokens: int) -> LengthRange:
        """What the histogram says, whether there is a predictor or not."""
        return self.histogram.predict(prompt_class(prompt_tokens))

    def ended(self, prompt: bytes, answer_tokens: int) -> None:
        """The answer to a prompt has come to its end."""
        self.histogram.observe(prompt_class(tokens_in(prompt)), answer_tokens)
