"""Who has a sequence, as far as its gateway has heard.

An instance says to whom it hands over, and whoever has a sequence is heard by its tokens. The two come over different
connections and either may be lost, so what is kept is a chain: each may still have it, or have handed it to the next.
"""


class Holders:
    """Those of one attempt. ``prefill`` has it first; ``decode`` is whom the route names, empty: nobody."""

    def __init__(self, prefill: str, decode: str) -> None:
        self._prefill = prefill
        self._chain = list(dict.fromkeys(name for name in (prefill, decode) if name))
        self.decode = decode

    @property
    def names(self) -> tuple[str, ...]:
        """Whoever may have it, each before the one that it hands over to."""
        return tuple(self._chain)

    @property
    def decoding(self) -> bool:
        """Whether another than the first has been heard."""
        return self._chain[0] != self._prefill

    def after(self, instance: str) -> str:
        """To whom it hands over; itself, if that is not known."""
        later = self._chain[self._chain.index(instance) + 1 :] if instance in self._chain else []
        return later[0] if later else instance

    def spoke(self, instance: str) -> None:
        """New tokens came from there: nobody before has it any more."""
        if instance in self._chain:
            self._chain = self._chain[self._chain.index(instance) :]
        else:
            # The news of it was lost, or comes later.
            self._chain = [instance]
            self.decode = instance

    def hands_over(self, instance: str, to: str) -> None:
        """It says so, after all tokens that are known. ``to`` itself: it keeps the sequence after all."""
        if instance not in self._chain:
            self._chain.append(instance)
        place = self._chain.index(instance) + 1
        before, later = self._chain[:place], self._chain[place:]
        if to in later:
            # It has said already to whom it hands over in its turn.
            self._chain = before + later[later.index(to) :]
        elif to == instance:
            self._chain = before
        else:
            self._chain = [*(name for name in before if name != to), to]
        self.decode = self._chain[-1]
