"""When roles change (TetriInfer, section 3.5), and that no role is ever left empty."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.messages.cluster import LanguageRole
from common.policies.language.flip import ChatLoad, FlipInstance, FlipPolicy, IdleFlip, InstanceLoad, QueueFlip

PREFILL, DECODE = LanguageRole.PREFILL, LanguageRole.DECODE
NOTHING = ChatLoad()


def _asked(
    policy: FlipPolicy, loads: list[InstanceLoad], from_s: float, to_s: float
) -> list[tuple[float, FlipInstance]]:
    """Asked every tenth of a second; with the time of each decision."""
    found = []
    for tenth in range(round(from_s * 10), round(to_s * 10) + 1):
        found += [(tenth / 10, flip) for flip in policy.handle(loads, tenth / 10, NOTHING)]
    return found


def test_idle_for_a_minute_while_the_other_role_has_work() -> None:
    loads = [
        InstanceLoad("p0", PREFILL, 0, False),
        InstanceLoad("p1", PREFILL, 0, True),
        InstanceLoad("d0", DECODE, 0, True),
    ]
    ((at_s, flip), *_) = _asked(IdleFlip(), loads, 0, 65)
    assert (at_s, flip.instance, flip.role) == (60.0, "p0", DECODE) and flip.reason == "idle for 60 s"


def test_the_minute_begins_again_with_every_bit_of_work() -> None:
    idle = [
        InstanceLoad("p0", PREFILL, 0, False),
        InstanceLoad("p1", PREFILL, 0, True),
        InstanceLoad("d0", DECODE, 0, True),
    ]
    busy = [InstanceLoad("p0", PREFILL, 1, True), *idle[1:]]
    policy = IdleFlip()
    assert _asked(policy, idle, 0, 50) == [] and policy.handle(busy, 50.1, NOTHING) == []
    assert _asked(policy, idle, 50.2, 110) == []
    assert _asked(policy, idle, 110.1, 111)[0][0] == pytest.approx(110.2)


def test_nobody_flips_to_where_there_is_nothing_to_do_or_from_a_roles_last_instance() -> None:
    idle_everywhere = [
        InstanceLoad("p0", PREFILL, 0, False),
        InstanceLoad("p1", PREFILL, 0, False),
        InstanceLoad("d0", DECODE, 0, False),
    ]
    assert _asked(IdleFlip(), idle_everywhere, 0, 70) == []
    last = [InstanceLoad("p0", PREFILL, 0, False), InstanceLoad("d0", DECODE, 9, True)]
    assert _asked(IdleFlip(), last, 0, 70) == [] and _asked(QueueFlip(), last, 0, 70) == []


def test_one_flip_at_a_time() -> None:
    loads = [
        InstanceLoad("p0", PREFILL, 9, True),
        InstanceLoad("d0", DECODE, 0, False, flipping=True),
        InstanceLoad("d1", DECODE, 0, False),
        InstanceLoad("d2", DECODE, 0, False),
    ]
    assert _asked(QueueFlip(cost_s=1.0), loads, 0, 10) == [] and _asked(IdleFlip(1.0), loads, 0, 10) == []


_STEPS = st.lists(st.tuples(st.integers(0, 5), st.lists(st.integers(0, 12), min_size=6, max_size=6)), max_size=60)


@settings(max_examples=100, deadline=None)
@given(prefill=st.integers(1, 5), steps=_STEPS, which=st.booleans())
def test_no_role_is_ever_left_empty(prefill: int, steps: list[tuple[int, list[int]]], which: bool) -> None:
    policy: FlipPolicy = QueueFlip(cost_s=0.5) if which else IdleFlip(idle_s=0.3)
    roles = {f"l{number}": PREFILL if number < prefill else DECODE for number in range(6)}
    flipping: dict[str, LanguageRole] = {}
    now_s = 0.0
    for drains, waiting in steps:
        now_s += 0.1 * (1 + drains)
        loads = [
            InstanceLoad(name, role, count, count > 0, name in flipping)
            for (name, role), count in zip(roles.items(), waiting, strict=True)
        ]
        for flip in policy.handle(loads, now_s, ChatLoad(to_prefill=1000 * sum(waiting))):
            assert flip.role is not roles[flip.instance] and not flipping
            flipping[flip.instance] = flip.role
        left = [role for name, role in roles.items() if name not in flipping]
        assert PREFILL in left and DECODE in left
        if drains > 2:
            roles |= flipping
            flipping.clear()


@pytest.mark.parametrize("policy", [IdleFlip(), QueueFlip()], ids=["idle", "queue"])
def test_a_role_that_has_had_nobody_for_a_while_gets_the_least_busy_instance(policy: FlipPolicy) -> None:
    loads = [InstanceLoad("d0", DECODE, 0, True), InstanceLoad("d1", DECODE, 0, False)]
    ((at_s, flip), *_) = _asked(policy, loads, 0, 3)
    assert (at_s, flip.instance, flip.role) == (2.0, "d1", PREFILL)
    assert flip.reason == "nobody has been there for prefill"
    both = [*loads, InstanceLoad("p0", PREFILL, 0, True)]
    # Who comes back in time has its role still, and the last one of all keeps it.
    assert policy.handle(both, 5.0, NOTHING) == []
    assert _asked(policy, loads, 10, 11.9) == [] and policy.handle(both, 12.0, NOTHING) == []
    assert _asked(policy, loads, 12.1, 14.0) == [] and _asked(policy, loads[:1], 20, 30) == []
