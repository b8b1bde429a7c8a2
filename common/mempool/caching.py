"""Who keeps keys and values for later: one setting, from no caching at all to MemServe's design (figure 4)."""

from enum import StrEnum


class Caching(StrEnum):
    """Each design has all that those before it have.

    PD_BASIC      nobody keeps anything.
    PD_CACHING_1  who computes a prompt keeps it: ``match`` before, ``insert`` after.
    PD_CACHING_2  who decodes keeps prompt and answer, and is sent only what it lacks.
    PD_CACHING_3  who decoded sends the answer's keys and values back to who prefilled.
    """

    PD_BASIC = "pd_basic"
    PD_CACHING_1 = "pd_caching_1"
    PD_CACHING_2 = "pd_caching_2"
    PD_CACHING_3 = "pd_caching_3"

    @property
    def keeps_computed(self) -> bool:
        """Whether an instance keeps what it has computed from the first token on."""
        return self is not Caching.PD_BASIC

    @property
    def keeps_received(self) -> bool:
        """Whether it keeps what it was handed over, and what it added."""
        return self in (Caching.PD_CACHING_2, Caching.PD_CACHING_3)

    @property
    def sends_back(self) -> bool:
        return self is Caching.PD_CACHING_3
