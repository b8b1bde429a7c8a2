"""What can go wrong with a language model's files or with a request to it. Each message says what to change."""


class CausalLMError(Exception):
    """The root of the errors of this family."""


class ModelLoadError(CausalLMError):
    """A model's files are missing, damaged or cannot be read."""


class UnsupportedModelError(ModelLoadError):
    """The architecture keeps state that paged attention cannot hold, or computes attention in another way."""


class WrongChunkError(CausalLMError, ValueError):
    """A chunk does not fit its block table, the pool or the model."""


class WrongSamplingError(CausalLMError, ValueError):
    """A sampling setting is out of its range."""
