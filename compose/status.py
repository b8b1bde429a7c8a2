"""``triptych status`` and ``triptych models``: what a running stack consists of, and what it can make."""

import asyncio
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from compose.client import StackClient

_STATE_STYLES = {"ready": "green", "starting": "yellow", "draining": "yellow"}


def run_status(base_url: str) -> int:
    """Print the members of the cluster and the jobs by state; 0 if the stack is ready, 1 if something is missing."""
    cluster = asyncio.run(_get(base_url, "/v1/cluster"))
    table = Table("instance", "state", "slot", "device", "model", "roles", "up", box=None, pad_edge=False)
    for member in cluster["members"]:
        state = str(member["state"])
        table.add_row(
            member["instance"],
            f"[{_STATE_STYLES.get(state, 'default')}]{state}[/]",
            "" if member["slot"] is None else str(member["slot"]),
            member["device"],
            member["model"] or "",
            ", ".join(member["roles"]),
            _age(time.time() - member["started_at_s"]),
        )
    console = Console()
    console.print(table)
    videos = ", ".join(f"{count} {state}" for state, count in cluster["videos"].items() if count)
    console.print(f"\nvideos: {videos or 'none yet'}; {cluster['queue_depth']} not yet taken from the queue")
    if not cluster["ready"]:
        console.print(f"[yellow]not ready: waiting for {', '.join(cluster['missing'])}[/]")
    return 0 if cluster["ready"] else 1


def run_models(base_url: str) -> int:
    """Print what each served model can be asked for."""
    console = Console()
    for model in asyncio.run(_get(base_url, "/v1/models"))["data"]:
        if model["kind"] == "language":
            console.print(f"[bold]{model['id']}[/] (language)")
            console.print(f"  context    {model['language']['context_tokens']} tokens, prompt and answer together")
            continue
        limits = model["video"]
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_row("  sizes", ", ".join(limits["sizes"]) + f" (default {limits['default_size']})")
        table.add_row("  frames", ", ".join(map(str, limits["frames"])) + f" (default {limits['default_frames']})")
        for name in ("fps", "steps", "guidance_scale"):
            low, high = limits[name]
            table.add_row(f"  {name}", f"{low:g} to {high:g} (default {limits[f'default_{name}']:g})")
        table.add_row("  prompt", f"at most {limits['max_prompt_tokens']} tokens")
        console.print(f"[bold]{model['id']}[/] (video)")
        console.print(table)
    return 0


async def _get(base_url: str, path: str) -> dict[str, Any]:
    async with StackClient(base_url) as client:
        return await client.get(path)


def _age(seconds: float) -> str:
    minutes, rest_s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest_s} s" if minutes else f"{rest_s} s"
