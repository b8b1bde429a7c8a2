"""``vllm bench serve`` again and again in one process, since loading vLLM takes longer than most runs.

Run by the Python of vLLM's own environment, so it imports nothing of ours. Says ``ready``; then for each line of
standard input, a JSON list of that command's arguments, one line of JSON with the numbers of its result comes out. What
the command prints goes to standard error.
"""

import asyncio
import contextlib
import importlib
import json
import os
import sys

# What the client computes must not take the servers' cores, and it asks no hub.
for _name, _value in (("OMP_NUM_THREADS", "1"), ("HF_HUB_OFFLINE", "1"), ("VLLM_NO_USAGE_STATS", "1")):
    os.environ.setdefault(_name, _value)


def main() -> None:
    """Serve until standard input ends."""
    told = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        serve = importlib.import_module("vllm.benchmarks.serve")
        parser = importlib.import_module("vllm.utils.argparse_utils").FlexibleArgumentParser()
        serve.add_cli_args(parser)
        print("ready", file=told, flush=True)
        for line in sys.stdin:
            result = asyncio.run(serve.main_async(parser.parse_args(json.loads(line))))
            # Without what it lists request by request.
            told_of = {name: value for name, value in result.items() if isinstance(value, int | float)}
            print(json.dumps(told_of), file=told, flush=True)


if __name__ == "__main__":
    main()
