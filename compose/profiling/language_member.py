"""The process that measures the language model: ``python -m compose.profiling.language_member REPEATS WARM_UP``.

It has the environment of a prefill instance and computes what instances do: chunks of many sizes, prompts, decoding
steps; and it fetches keys and values from a second process. What came of it is one line of JSON, as the profile has it.
"""

import asyncio
import json
import sys
from collections.abc import Sequence

import torch

from common.language.loading import open_model
from common.language.settings import LanguageSettings, model_name
from common.models.causal_lm import CausalLM, KVPool
from common.models.memory import keep_freed_memory
from common.policies.language.language_costs import LanguageCosts
from common.policies.language.prefill_profile import PrefillProfile
from common.runtime.process import CannotServe
from common.runtime.settings import SettingsError, load_settings
from common.runtime.worker import choose_device, choose_precision
from compose.profiling.chunk_rates import measured
from compose.profiling.fit import error_of, fit_chunks, fit_link, fit_steps
from compose.profiling.operators import Passes, chunk_works, prompt_works, step_works
from compose.profiling.transfer import measure_transfer


def costs_of(
    name: str, passes: Passes, pool: KVPool, sent: Sequence[tuple[int, float]], repeats: int, warm_up: int
) -> LanguageCosts:
    """Measure, fit, and look how far off that is.

    Args:
        sent: (bytes, seconds) of transfers; every other one is held out.
    """
    parts = [
        chunk_works(passes.longest, passes.chunk_tokens),
        prompt_works(passes.longest),
        step_works(passes.longest, passes.room),
        step_works(passes.longest, passes.room, held_out=True),
    ]
    timed = iter(passes.timed([work for part in parts for work in part], repeats, warm_up))
    chunks, prompts, steps, other_steps = ([next(timed) for _ in part] for part in parts)
    prefill, decode, link = fit_chunks(chunks, passes.chunk_tokens), fit_steps(steps), fit_link(sent[::2])
    errors = {
        "prefill": error_of(
            [prefill.exec_s(one.work.tokens, one.work.cached) for one in prompts], [one.seconds for one in prompts]
        ),
        "decode": error_of(
            [decode.step_s(one.work.sequences, one.work.sequences * one.work.tokens) for one in other_steps],
            [one.seconds for one in other_steps],
        ),
        "transfer": error_of([link.send_s(size, 1) for size, _ in sent[1::2]], [seconds for _, seconds in sent[1::2]]),
    }
    return LanguageCosts(name, pool.layout.token_bytes, prefill, decode, link, errors)


def profile(name: str, model: CausalLM, pool: KVPool, repeats: int, warm_up: int) -> dict[str, object]:
    """What the profile's file has of this model."""
    rates = PrefillProfile(name, measured(model, pool, repeats, warm_up))
    passes = Passes(model, pool, rates.chunk_tokens)
    sent = asyncio.run(measure_transfer(pool, repeats, warm_up))
    costs = costs_of(name, passes, pool, sent, repeats, warm_up)
    return {"prefill": rates.to_content(), **costs.to_content()}


def main(repeats: int, warm_up: int) -> None:
    """Measure and say so; what goes wrong is said in the last line of standard error."""
    keep_freed_memory()
    try:
        settings = load_settings(LanguageSettings)
        torch.set_num_threads(settings.threads)
        device = choose_device(settings)
        model, pool = open_model(settings, device, choose_precision(settings, device))
    except (CannotServe, SettingsError) as error:
        sys.exit(str(error))
    found = profile(model_name(settings.language_model), model, pool, repeats, warm_up)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
