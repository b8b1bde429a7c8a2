"""The profile for people: step times by degree, what each doubling saves (z), and the optimal degree by the rule."""

from collections.abc import Mapping, Sequence

from common.policies.video.rib import Rib, VideoKind, doubling_gains


def table(rib: Rib, tokens: Mapping[VideoKind, int]) -> str:
    """Lines of equal columns. DDiT's z (``doubling_gains``) stands behind each step time from degree 2 on."""
    head = ["size", "frames", "tokens", *(f"step at {degree}" for degree in rib.degrees), "optimal", "VAE"]
    rows = [head]
    for kind, profile in rib.profiles.items():
        gains = doubling_gains(profile.step_s)
        steps = [
            milliseconds(profile.step_s[degree]) + (f" {100 * gains[degree]:+4.0f} %" if degree in gains else "")
            for degree in rib.degrees
        ]
        size = f"{kind.width}x{kind.height}"
        optimal = str(rib.optimal_degree(kind))
        count = str(tokens.get(kind, "-"))
        rows.append([size, str(kind.frames), count, *steps, optimal, milliseconds(profile.decode_s)])
    return "\n".join(aligned(rows))


def milliseconds(seconds: float) -> str:
    """Three digits, as far as that makes sense."""
    value = seconds * 1000
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 10 else f"{value:.2f} ms"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The cells of each column to the right, at the width of its widest."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
