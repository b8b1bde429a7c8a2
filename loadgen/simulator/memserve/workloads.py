"""MemServe's three workloads, made after what is published of them (table 7 and figure 7).

Lengths are drawn from the published quantiles, with straight lines between them. How the first turn of a conversation
differs from later ones is not published: those lengths are ours, chosen so that prompts and shared prefixes come out
near the published ones (a test holds how near).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loadgen.simulator.memserve.turns import Turn

TOKEN_BYTES = 4
# Of the scheduler study, how many sessions are under way at a time. Not published.
STUDY_WINDOW = 8


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of token counts: (share, tokens) from share 0 to share 1."""

    points: tuple[tuple[float, int], ...]

    def draw(self, chance: random.Random) -> int:
        share = chance.random()
        for (low, least), (high, most) in zip(self.points, self.points[1:], strict=False):
            if share <= high:
                return max(1, round(least + (most - least) * (share - low) / (high - low)))
        return self.points[-1][1]


@dataclass(frozen=True, slots=True)
class Chats:
    """A kind of conversation.

    Attributes:
        turns: (fewest, most); as many as a coin that falls so (``goes_on``) says.
        first: tokens that a conversation begins with.
        later: new tokens of each turn, the first one's question included if ``first`` is what all turns have in common.
        keeps_history: a prompt goes on from the one before and its answer; otherwise only from ``first``.
        most_prompt: a conversation ends before a prompt would be longer.
    """

    name: str
    turns: tuple[int, int]
    goes_on: float
    first: Lengths
    later: Lengths
    answer: Lengths
    keeps_history: bool
    most_prompt: int


SHAREGPT = Chats(
    name="sharegpt",
    turns=(1, 8),
    goes_on=0.68,
    first=Lengths(((0, 6), (0.3, 22), (0.6, 60), (0.9, 400), (1, 1200))),
    later=Lengths(((0, 10), (0.5, 150), (0.9, 650), (1, 1200))),
    answer=Lengths(((0, 5), (0.1, 68), (0.5, 292), (0.9, 635), (0.99, 975), (1, 1042))),
    keeps_history=True,
    most_prompt=3155,
)
LOOGLE = Chats(
    name="loogle",
    turns=(5, 6),
    goes_on=0.5,
    first=Lengths(((0, 1500), (0.1, 1560), (0.5, 1735), (0.9, 1985), (0.99, 2710), (1, 2860))),
    later=Lengths(((0, 8), (0.5, 24), (1, 38))),
    answer=Lengths(((0, 2), (0.1, 8), (0.5, 19), (0.9, 41), (0.99, 72), (1, 98))),
    keeps_history=False,
    most_prompt=2898,
)
REACT = Chats(
    name="react",
    turns=(1, 5),
    goes_on=0.87,
    first=Lengths(((0, 1780), (0.5, 1920), (1, 2100))),
    later=Lengths(((0, 30), (0.5, 90), (0.9, 200), (1, 300))),
    answer=Lengths(((0, 30), (0.1, 58), (0.5, 127), (0.9, 312), (0.99, 451), (1, 537))),
    keeps_history=True,
    most_prompt=3049,
)
WORKLOADS = {chats.name: chats for chats in (SHAREGPT, LOOGLE, REACT)}


def make_turns(chats: Chats, requests: int, rate: float, seed: int) -> list[Turn]:
    """About so many requests (whole conversations), ``rate`` a second, in no order between conversations."""
    chance = random.Random(seed)
    conversations: list[list[Turn]] = []
    while sum(len(one) for one in conversations) < requests:
        conversations.append(_conversation(chats, f"{chats.name}-{len(conversations)}", chance))
    return _arriving(conversations, rate, chance)


def repeated(chats: Chats, sessions: int, turns: int, times: int, rate: float, seed: int) -> list[Turn]:
    """The scheduler's study (figure 15): a set of sessions, asked by ``times`` crowds of clients at once, each of them
    with its own ``rate``, that know nothing of each other: only prompts tell what they share."""
    chance = random.Random(seed)
    once = [_conversation(chats, f"{chats.name}-{number}", chance)[:turns] for number in range(sessions)]
    copies = [[_renamed(turn, copy) for turn in one] for copy in range(times) for one in once]
    # Each crowd goes through the sessions in the same order.
    copies = [copies[copy * sessions + number] for number in range(sessions) for copy in range(times)]
    return _arriving(copies, rate * times, chance, window=STUDY_WINDOW * times)


def alike(requests: int, prompt_tokens: int, answer_tokens: int, rate: float, seed: int) -> list[Turn]:
    """Requests of one length that share nothing (figure 12: 1,024 and 32)."""
    chance = random.Random(seed)
    lengths = Lengths(((0, prompt_tokens), (1, prompt_tokens))), Lengths(((0, answer_tokens), (1, answer_tokens)))
    chats = Chats("alike", (1, 1), 0.0, lengths[0], lengths[0], lengths[1], True, prompt_tokens)
    return _arriving([_conversation(chats, f"alike-{number}", chance) for number in range(requests)], rate, chance)


def _conversation(chats: Chats, name: str, chance: random.Random) -> list[Turn]:
    least, most = chats.turns
    wanted = least
    while wanted < most and chance.random() < chats.goes_on:
        wanted += 1
    head = chance.randbytes(chats.first.draw(chance) * TOKEN_BYTES)
    prompt = head
    turns: list[Turn] = []
    while len(turns) < wanted:
        if turns or not chats.keeps_history:
            before = prompt + turns[-1].answer if chats.keeps_history else head
            prompt = before + chance.randbytes(chats.later.draw(chance) * TOKEN_BYTES)
        if turns and len(prompt) > chats.most_prompt * TOKEN_BYTES:
            break
        answer = chance.randbytes(chats.answer.draw(chance) * TOKEN_BYTES)
        turns.append(
            Turn(
                name=f"{name}.{len(turns)}",
                arrival_s=0.0,
                prompt_tokens=len(prompt) // TOKEN_BYTES,
                answer_tokens=len(answer) // TOKEN_BYTES,
                conversation=name,
                after=turns[-1].name if turns else "",
                tokens=prompt,
                answer=answer,
            )
        )
    return turns


def _renamed(turn: Turn, copy: int) -> Turn:
    after = f"{copy}:{turn.after}" if turn.after else ""
    return replace(turn, name=f"{copy}:{turn.name}", conversation=f"{copy}:{turn.conversation}", after=after)


def _arriving(
    conversations: Sequence[Sequence[Turn]], rate: float, chance: random.Random, window: int | None = None
) -> list[Turn]:
    """At each moment of a Poisson process the next turn of any of the first ``window`` conversations (None: of all)
    that have one."""
    waiting = [list(reversed(one)) for one in reversed(conversations)]
    under_way: list[list[Turn]] = []
    now_s, arriving = 0.0, []
    while waiting or under_way:
        while waiting and (window is None or len(under_way) < window):
            under_way.append(waiting.pop())
        now_s += chance.expovariate(rate)
        number = chance.randrange(len(under_way))
        arriving.append(replace(under_way[number].pop(), arrival_s=now_s))
        if not under_way[number]:
            under_way[number] = under_way[-1]
            under_way.pop()
    return arriving
