"""Finds stop strings in text that comes in pieces, holding back whatever may yet become one. Pure."""

from collections.abc import Sequence


class StopStrings:
    """Looks for the first of ``stops``; with none, everything passes."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """What may be shown now. Once ``found``, that is the end: neither the stop string nor what follows is shown."""
        if not self._stops:
            return text
        text = self._held + text
        found = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.found = True
            self._held = ""
            # The one that is whole first, so that it is the same in whichever pieces the text comes.
            _, place = min(found)
            return text[:place]
        held = max(_beginning(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held


def _beginning(text: str, stop: str) -> int:
    """How long the longest end of ``text`` is with which ``stop`` begins, less than all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
