"""What every result says of where it comes from."""

import os
import platform


def this_machine(*, simulated: bool) -> dict[str, object]:
    """This machine, and whether what it ran was real."""
    return {
        "simulated": simulated,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
