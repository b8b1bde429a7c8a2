"""The paper's measurements of how requests slow each other (TetriInfer, section 2.2, figures 2 to 5), and the model's.

Every point is one pass of a coupled engine, of whatever phases: no scheduling is involved. They are what the model of
the cost stands or falls by.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from loadgen.simulator.language.cost import EngineCost, StepWork

# Tokens of the paper's light and heavy prompts; and contexts of light and heavy decodes, which are assumed.
LIGHT_PROMPT, HEAVY_PROMPT = 18, 512
LIGHT_CONTEXT, HEAVY_CONTEXT = 40, 310
_BESIDE = (0, 1, 3, 7, 15, 31, 63)


@dataclass(frozen=True, slots=True)
class SeriesPoint:
    """One point of a figure: what the pass held, how long the paper's took, in milliseconds."""

    figure: str
    what: str
    count: int
    paper_ms: float
    work: StepWork

    def model_ms(self, cost: EngineCost) -> float:
        return 1000 * cost.step_s(self.work)


def series() -> Iterator[SeriesPoint]:
    """All points of figures 2 to 5."""
    for tokens, ms in zip(
        (8, 16, 32, 64, 128, 256, 512, 1024), (28.7, 35.2, 36.7, 45.8, 63.1, 92.8, 143.6, 287.0), strict=True
    ):
        yield SeriesPoint("2a", "prompt tokens", tokens, ms, StepWork(tokens, 0, 0, 0))
    for batch, ms in zip(
        (2, 4, 8, 16, 32, 64, 128, 256, 512), (27.5, 31.8, 33.5, 44.8, 48.4, 69.0, 112.0, 190.0, 357.0), strict=True
    ):
        yield SeriesPoint("2b", "decoding sequences", batch, ms, StepWork(0, 0, batch, batch * LIGHT_CONTEXT))
    yield from _beside("3a", "light prefill, light prefills", (40.6, 46.5, 63.1, 76.9, 106, 176, 333), _light_light)
    yield from _beside("3b", "light prefill, heavy prefills", (40.6, 156, 413), _light_heavy)
    yield from _beside("3c", "heavy prefill, light prefills", (142, 156, 166, 175, 225, 301, 469), _heavy_light)
    yield from _beside("4a", "light decode, light prefills", (26.7, 32.2, 46.3, 66.4, 101, 185, 325), _decode_light)
    yield from _beside("4b", "light decode, heavy prefills", (26.8, 135, 383), _decode_heavy)
    yield from _beside("4c", "light prefill, light decodes", (40.6, 39.0, 41.0, 39.6, 47.6, 58.9, 80.0), _light_decodes)
    yield from _beside("4d", "heavy prefill, light decodes", (134, 135, 135, 156, 159, 172, 190), _heavy_decodes)
    yield from _decodes()


def _beside(
    figure: str, what: str, measured: tuple[float, ...], work: Callable[[int], StepWork]
) -> Iterator[SeriesPoint]:
    for count, ms in zip(_BESIDE, measured, strict=False):
        yield SeriesPoint(figure, what, count, ms, work(count))


def _decodes() -> Iterator[SeriesPoint]:
    """Figure 5: tokens a second at batches of light and heavy decodes."""
    rates = {
        "all light": (0.0, (78, 166, 310, 541, 741, 1054, 1284)),
        "1:1": (0.5, (81, 156, 242, 434, 674, 910, 1045)),
        "all heavy": (1.0, (77, 130, 239, 432, 669, 817, 951)),
    }
    for what, (heavy, measured) in rates.items():
        context = LIGHT_CONTEXT + heavy * (HEAVY_CONTEXT - LIGHT_CONTEXT)
        for batch, rate in zip((2, 4, 8, 16, 32, 64, 128), measured, strict=True):
            yield SeriesPoint("5", what, batch, 1000 * batch / rate, StepWork(0, 0, batch, round(batch * context)))


def _light_light(count: int) -> StepWork:
    return StepWork(LIGHT_PROMPT * (1 + count), 0, 0, 0)


def _light_heavy(count: int) -> StepWork:
    return StepWork(LIGHT_PROMPT + HEAVY_PROMPT * count, 0, 0, 0)


def _heavy_light(count: int) -> StepWork:
    return StepWork(HEAVY_PROMPT + LIGHT_PROMPT * count, 0, 0, 0)


def _decode_light(count: int) -> StepWork:
    return StepWork(LIGHT_PROMPT * count, 0, 1, LIGHT_CONTEXT)


def _decode_heavy(count: int) -> StepWork:
    return StepWork(HEAVY_PROMPT * count, 0, 1, LIGHT_CONTEXT)


def _light_decodes(count: int) -> StepWork:
    return StepWork(LIGHT_PROMPT, 0, count, LIGHT_CONTEXT * count)


def _heavy_decodes(count: int) -> StepWork:
    return StepWork(HEAVY_PROMPT, 0, count, LIGHT_CONTEXT * count)
