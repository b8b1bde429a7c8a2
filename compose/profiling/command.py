"""``triptych profile``: measure, write the RIB, print the table."""

import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from common.policies.video.rib import DegreeRule, Rib, WrongRib
from compose.errors import StartError
from compose.files import prepare_file, write_whole
from compose.profiling.crew import crew_of
from compose.profiling.in_stack import check_in_stack, measure_in_stack
from compose.profiling.language import LanguageProfile, costs_table, measure_language, prefill_table
from compose.profiling.measure import Measured, measure
from compose.profiling.plan import Plan, ProfileOptions, make_plan
from compose.profiling.table import milliseconds, table
from compose.up import report

_INTERRUPTED = 130


def run_profile(options: ProfileOptions) -> int:
    """Profile the models on this machine; returns the exit code.

    Raises:
        OptionError: an option does not fit.
        StartError: a process could not measure.
    """
    prepare_file(options.output)
    if options.in_stack:
        check_in_stack(options)
    plan = make_plan(options)
    content: dict[str, Any] = {}
    try:
        if plan.model:
            content |= json.loads(_video(plan).to_json())
        if plan.language_model:
            content |= _language(plan).to_content()
    except KeyboardInterrupt:
        return _INTERRUPTED
    write_whole(options.output, json.dumps(content, indent=1) + "\n")
    sys.stdout.write(f"{options.output}\n")
    return 0


def _video(plan: Plan) -> Rib:
    measured = asyncio.run(_measure(plan))
    try:
        rib = Rib(measured.profiles, DegreeRule(plan.options.rule), plan.options.threshold)
    except WrongRib as error:
        raise StartError(f"what was measured makes no profile: {error}") from error
    sys.stdout.write(f"{table(rib, measured.tokens)}\n\n{_notes(plan, measured, rib)}\n")
    return rib


def _language(plan: Plan) -> LanguageProfile:
    profile = asyncio.run(measure_language(plan.language_model, plan.options))
    separator = "\n" if plan.model else ""
    sys.stdout.write(f"{separator}{prefill_table(profile.prefill)}\n\n{costs_table(profile.costs)}\n")
    return profile


async def _measure(plan: Plan) -> Measured:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} of {task.total} kinds"))
    with (
        tempfile.TemporaryDirectory(prefix="triptych-profile-") as folder,
        Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as progress,
    ):
        task = progress.add_task("starting", total=len(plan.kinds))

        def watch(what: str, done: int, of: int) -> None:
            progress.update(task, description=what, completed=done, total=of)

        if plan.options.in_stack:
            return await measure_in_stack(plan, watch)
        async with crew_of(plan) as crew:
            return await measure(plan, crew, Path(folder), watch)


def _notes(plan: Plan, measured: Measured, rib: Rib) -> str:
    options = plan.options
    form = "guidance, then " if options.guidance_parallel else ""
    busy = "the other slots idle" if options.alone else "all slots at work"
    rule = options.rule.replace("_", "-") + (f" of {options.threshold:g}" if rib.rule is DegreeRule.THRESHOLD else "")
    cores = len(os.sched_getaffinity(0))
    if measured.device == "cpu" and measured.slots * options.threads > cores:
        report(f"triptych: {measured.slots} slots share {cores} cores, so that their times are those of a crowd")
    encode_s = next(iter(measured.profiles.values())).encode_s
    if options.in_stack:
        rest = f"{milliseconds(encode_s)} of a video without a slot"
        return f"{measured.slots} slots of a stack, all at work; {rest}; optimal by {rule}"
    return (
        f"{measured.slots} slots of {measured.device}, {busy}; a group shares {form}{options.sequence}; "
        f"text encoder {milliseconds(encode_s)}; optimal by {rule}"
    )
