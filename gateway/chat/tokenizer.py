"""The language model's tokenizer and chat template, as the gateway uses them.

Read with the ``tokenizers`` library and Jinja alone: transformers would take seconds and a quarter of a gigabyte to say
the same, and the gateway has no other use for it.
"""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gateway.chat.pieces import TokenPieces, UnknownDecoder
from gateway.chat.template import ChatTemplate, WrongTemplate

_FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
_DEMO = "demo"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class TokenizerError(ValueError):
    """There is no tokenizer that can be used; the text says what to change."""


class LanguageTokenizer:
    """Text to token ids. ``template`` is None where the model has no chat template."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        """Raises: UnknownDecoder."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.template = template
        self.pieces = TokenPieces(tokenizer)
        self.size: int = tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """The ids of a plain text, with the special tokens that the model expects around one."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> list[int]:
        """The ids of a conversation up to where the answer begins. Only for a model that has a template.

        Raises:
            TemplateRefusal: the template cannot make a prompt of these messages.
        """
        if self.template is None:
            raise RuntimeError("encode_chat without a chat template")
        text = self.template.render(messages, arguments)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def load_tokenizer(location: str) -> LanguageTokenizer:
    """The tokenizer of a local folder, of a hub name (downloaded once), or of the shipped demo model. Blocks.

    Raises:
        TokenizerError: see there.
    """
    folder = _folder(location)
    config = _config(folder)
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # The library raises plain exceptions for whatever it cannot read.
    except Exception as error:
        raise TokenizerError(f"{location}: no tokenizer.json that can be read: {error}") from error
    try:
        source = _template_source(folder, config)
        return LanguageTokenizer(tokenizer, ChatTemplate(source, _special(config)) if source is not None else None)
    except (UnknownDecoder, WrongTemplate) as error:
        raise TokenizerError(f"{location}: {error}") from error


def _folder(location: str) -> Path:
    if location == _DEMO:
        return Path(str(files("common.models"))) / "demo_language" / "weights"
    folder = Path(location)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or location.startswith(".") or location.count("/") != 1:
        raise TokenizerError(f"{location}: there is no such folder, and a hub name has the form OWNER/NAME")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(location, allow_patterns=_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise TokenizerError(
            f"{location}: neither a folder here nor a hub repository that can be read: {error}"
        ) from error


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path} is no JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def _template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        # Older files have several by name.
        template = {str(entry.get("name")): entry.get("template") for entry in template}.get("default")
    return template if isinstance(template, str) else None


def _special(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens by name; each is a text, or an object that has one."""
    found = {name: config.get(name) for name in _SPECIAL}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}
