"""What can go wrong with a model's files or a request to it. Each message says what to change."""


class ModelError(Exception):
    """The root of the errors of this family."""


class ModelLoadError(ModelError):
    """A model's files are missing, damaged or of another architecture."""


class PromptTooLongError(ModelError, ValueError):
    """A prompt has more tokens than the model reads."""

    def __init__(self, tokens: int, limit: int) -> None:
        super().__init__(f"the prompt has {tokens} tokens, the model reads at most {limit}: shorten it")
        self.tokens = tokens
        self.limit = limit
