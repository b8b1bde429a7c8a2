"""A chat's instances by one of ``routing_rules`` (MemServe, section 6), by costs that what is seen corrects."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from common.policies.language.chat_events import ChatArrived
from common.policies.language.least_delay import LeastDelay
from common.policies.language.prefill_cost import DecodeCost, LinkCost, RateCost
from common.policies.language.routing import Ask, Choice, Costs, Pull, RequestArrived, Rule
from common.policies.language.routing_rules import RULES
from common.policies.language.seen_costs import SeenDelay, SeenRatio
from common.policies.language.sites import InstanceKind, Site

_BLOCK_TOKENS = 16


class FewestTokens:
    """Ours, in the place of TetriInfer's global scheduler (section 3.2): least to prefill, then least to generate.

    A prompt goes where what waits and what it lacks are least together. A fused instance keeps what it has prefilled:
    handing over would only cost.
    """

    def choose(self, ask: Ask, prefills: Sequence[Site], decodes: Sequence[Site]) -> Choice:
        prompt = ask.request.prompt_tokens

        def lacking(site: Site) -> int:
            """How many tokens would have to be prefilled there; the last one always has."""
            return prompt - min(site.cached_tokens, prompt - 1)

        prefill = min(prefills, key=lambda site: (site.prefill_tokens + lacking(site), site.answer_tokens, site.name))
        if prefill.kind is InstanceKind.FUSED:
            decode = prefill
            what = f"least to prefill of {len(prefills)}, and decodes too"
        else:
            decode = min(decodes, key=lambda site: (site.answer_tokens, site.prefill_tokens, site.name))
            what = f"least to prefill of {len(prefills)}, least to generate of {len(decodes)}"
        load = f"{prefill.prefill_tokens} tokens to prefill, {decode.answer_tokens} to generate before it"
        if cached := prompt - lacking(prefill):
            load += f"; {cached} of its {prompt} tokens are there"
        return Choice(prefill, decode, None, f"{what}: {load}")


CHAT_RULES: dict[str, Callable[[], Rule]] = {"fewest_tokens": FewestTokens, **RULES, "least_delay": LeastDelay}


def guessed_costs(prefill_tokens_s: float, transfer_tokens_s: float) -> Costs:
    """Of machines that nobody has measured: so many tokens a second are prefilled, and so many sent."""
    return Costs(
        prefill=RateCost(prefill_tokens_s),
        # As if each token of an answer were one of a prompt.
        decode=DecodeCost(0.0, 1 / prefill_tokens_s, 0.0),
        link=LinkCost(transfer_tokens_s, 0.0),
        kv_token_bytes=1,
        block_tokens=_BLOCK_TOKENS,
    )


@dataclass(frozen=True, slots=True)
class Chosen:
    """A rule's choice, and what it takes.

    Attributes:
        cached_tokens: of the prompt, at ``choice.prefill`` by the time that it begins.
        exec_s: of what is left, what the rule waits for included.
        fitted_s: the same by the costs as they were given; ``pull_s``: of the pull, likewise.
    """

    choice: Choice
    cached_tokens: int
    exec_s: float
    fitted_s: float
    pull_s: float

    @property
    def pull(self) -> Pull | None:
        return self.choice.pull


@dataclass(slots=True)
class ChatRule:
    """A rule, what it is told of the machines, all alike, and how much longer things have taken there of late.

    ``corrects``: whether the latter counts.
    """

    rule: Rule
    costs: Costs
    corrects: bool = True
    prefills: SeenRatio = field(default_factory=SeenRatio)
    pulls: SeenDelay = field(default_factory=SeenDelay)

    def choose(self, arrived: ChatArrived, prefills: Sequence[Site], decodes: Sequence[Site], now_s: float) -> Chosen:
        """One instance of each; neither is empty."""
        for site in {site.name: site for site in (*prefills, *decodes)}.values():
            site.look(now_s, arrived.cached.get(site.name, 0))
        conversation = arrived.conversation or arrived.request_id
        request = RequestArrived(
            arrived.request_id, conversation, b"", arrived.prompt_tokens, answer_tokens=arrived.max_tokens
        )
        factor, delay_s = (self.prefills.factor, self.pulls.delay_s(now_s)) if self.corrects else (1.0, 0.0)
        ask = Ask(request, self.costs.corrected(factor, delay_s))
        choice = self.rule.choose(ask, prefills, decodes)
        cached, pull_s = choice.prefill.cached_tokens, 0.0
        if choice.pull is not None:
            cached = choice.pull.to_token
            pull_s = ask.costs.send_s(choice.pull.to_token - choice.pull.from_token)
        cached = min(cached, arrived.prompt_tokens - 1)
        exec_s = ask.exec_s(cached)
        return Chosen(choice, cached, exec_s + choice.wait_s, exec_s / factor, pull_s)
