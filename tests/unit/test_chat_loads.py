"""What language instances have to do, as flips are shown it."""

import pytest

from common.policies.language.chat_loads import Between, flip_loads
from common.policies.language.sites import InstanceKind, Site


@pytest.mark.parametrize(("kv_tokens", "running"), [(100, 0), (300, 1), (0, 1)])
def test_a_prompt_is_computed_beside_what_others_are_to_fetch_as_far_as_memory_is_known(
    kv_tokens: int, running: int
) -> None:
    prefill = Site("prefill-0", InstanceKind.PREFILL, kv_tokens)
    prefill.take_prefill("a", exec_s=1.0, tokens=100, now_s=0.0)
    decode = Site("decode-0", InstanceKind.DECODE, kv_tokens)
    loads = flip_loads([prefill, decode], [Between("prefill-0", 60, "decode-0")], flipping="")
    assert [(load.instance, load.running) for load in loads] == [("prefill-0", running), ("decode-0", 0)]
