"""The part of ``loadgen sim`` that is MemServe's: its experiment, and traces with block ids."""

import argparse
from typing import Any

from common.policies.language.routing_rules import UnknownRule, make_rule
from loadgen.environment import this_machine
from loadgen.refusal import Refused
from loadgen.simulator.language.workloads import WrongTrace
from loadgen.simulator.memserve.experiment import TRACE_SIZES, run_paper, run_trace
from loadgen.simulator.memserve.machine import PAPER_MACHINE, TRACE_MACHINE
from loadgen.simulator.memserve.tables import print_paper, print_trace


def run_memserve(options: argparse.Namespace) -> dict[str, Any]:
    """``--experiment memserve``, or ``--trace FILE``.

    Raises:
        SystemExit: with one line that says what is wrong and what to change.
    """
    try:
        for name in options.policy or ():
            make_rule(name)
        rules = tuple(options.policy or ())
        if options.trace is not None:
            sizes = (options.gpus,) if options.gpus else TRACE_SIZES[:1] if options.quick else TRACE_SIZES
            result = run_trace(options.trace, rules, sizes, options.requests, options.speed)
            print_trace(result)
            machine, experiment = TRACE_MACHINE, "memserve-trace"
        else:
            result = run_paper(rules, options.requests, options.seeds, options.quick)
            print_paper(result)
            machine, experiment = PAPER_MACHINE, "memserve"
    except (UnknownRule, WrongTrace) as error:
        raise Refused(f"loadgen sim: {error}") from None
    environment = {
        **this_machine(simulated=True),
        "instances": machine.name,
        "trace": str(options.trace) if options.trace is not None else None,
        "speed": options.speed,
    }
    return {"experiment": experiment, "environment": environment, **result}
