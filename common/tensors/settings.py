"""How UCX is set up here, and why. A setting of the same name in the environment wins.

Transports are left to UCX (``TLS=all``): shared memory and CMA on one host, ``rc`` and ``cuda_ipc`` where the hardware
is there, TCP otherwise. What is set makes them usable together with UCX's peer error handling. Without it, a UCX
process whose peer is killed in the middle of a CMA read aborts: the survivor would die with the dead. With it, but
without the two capabilities below, UCX takes only TCP, or copies in fragments through shared memory.
"""

from collections.abc import Mapping

OPTIONS: Mapping[str, str] = {
    # Let shared memory be used by endpoints with error handling: it checks its peer by process id and start time.
    "MM_ERROR_HANDLING": "y",
    # The same for CMA's zero-copy read. UCX asks for memory invalidation so that nobody reads a buffer that its owner
    # took back after an error; here an owner keeps a tensor until every reader's deadline has passed.
    "CMA_MEMORY_INVALIDATE": "y",
    # How often peers are checked. A dead one is noticed within two intervals, without a message being sent to it,
    # unless it died before the first check: that one remembers what to compare with. Then deadlines end what waits.
    "KEEPALIVE_INTERVAL": "2s",
    # Share posix segments as /proc/<pid>/fd/<n> and unlink them at once: nothing stays behind after kill -9. (System V
    # segments are marked for removal as soon as both sides are attached.)
    "POSIX_USE_PROC_LINK": "y",
}

# Read by UCX when its library is loaded, before any option can be given. UCX logs to standard output by default.
LIBRARY_ENVIRONMENT: Mapping[str, str] = {
    "UCX_LOG_FILE": "stderr",
    "UCX_LOG_LEVEL": "fatal",
    "UCX_WARN_UNUSED_ENV_VARS": "n",
}


def context_options(environment: Mapping[str, str]) -> dict[str, str]:
    """The options to hand to a UCX context, less those that the user has set in the environment."""
    return {name: value for name, value in OPTIONS.items() if f"UCX_{name}" not in environment}
