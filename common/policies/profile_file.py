"""The file that ``triptych profile`` writes: JSON with a section for each thing that it measures."""

import json
from typing import Any


def section_of(text: str, key: str, wrong: type[ValueError]) -> Any:
    """What the file has under a key; None: there is nothing.

    Raises:
        ``wrong``: it is not JSON.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise wrong(f"not JSON: {error}") from None
    return content.get(key) if isinstance(content, dict) else None
