"""What is told of the fits: rows of the table, and the sentences below it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks._harness import Spread, plus_minus
from benchmarks.staged.contenders import CONTENDERS, find
from benchmarks.staged.fit import Fit
from benchmarks.staged.settings import STAGES, Settings

MB = 1e6
UNKNOWN = "-"
HEADS = [
    "contender",
    "whole run, s",
    "times as fast as by hand",
    "least by its arithmetic, s",
    "reached",
    "epochs",
    "first, s",
    "later, s",
    "optimizer, MB",
    "gradients, MB",
    "test accuracy, %",
]


@dataclass
class Result:
    """All fits, round by round."""

    settings: Settings
    data: str
    fits: dict[str, list[Fit]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def faster(slow: Sequence[Fit], quick: Sequence[Fit]) -> Spread:
    """How many times faster whole runs are, pair by pair within a round."""
    return Spread.of([one.seconds / other.seconds for one, other in zip(slow, quick)])


def limits(full: Sequence[Fit], fits: Sequence[Fit]) -> list[float]:
    """Seconds that the arithmetic of each run allows, at full fine-tuning's speed in its round."""
    return [
        fit.least * (one.seconds - one.updating) + fit.updated * one.updating
        for one, fit in zip(full, fits)
    ]


def by_seed(fits: Sequence[Fit]) -> dict[int, float]:
    """Per cent of the test texts sorted right, by seed."""
    found: dict[int, list[float]] = {}
    for fit in fits:
        found.setdefault(fit.seed, []).append(100 * fit.accuracy)
    return {seed: statistics.mean(values) for seed, values in found.items()}


def rows(result: Result) -> list[list[str]]:
    """Cells with one line for each third of the run, or a single line."""
    return [_row(result, key, fits) for key, fits in result.fits.items() if fits]


def _row(result: Result, key: str, fits: list[Fit]) -> list[str]:
    each = result.settings.epochs_per_stage
    hand, full = result.fits.get("hand"), result.fits.get("full")
    least = limits(full, fits) if full else None
    reached = [a / fit.seconds for a, fit in zip(least or (), fits)]

    def seconds(part: Callable[[int], slice]) -> str:
        found = [[statistics.median(f.epochs[part(i)] or [math.nan]) for f in fits] for i in thirds]
        return "\n".join(f"{statistics.median(v):.2f}".replace("nan", UNKNOWN) for v in found)

    thirds = range(STAGES)
    return [
        find(key).name + (" *" if any(fits[-1].dropout) else ""),
        f"{statistics.median(fit.seconds for fit in fits):.1f}",
        faster(hand, fits).text(2) if hand else UNKNOWN,
        f"{statistics.median(least):.1f}" if least else UNKNOWN,
        Spread.of(reached).text(2) if reached else UNKNOWN,
        "\n".join(f"{each * i + 1} to {each * (i + 1)}" for i in thirds),
        seconds(lambda i: slice(each * i, each * i + 1)),
        seconds(lambda i: slice(each * i + 1, each * (i + 1))),
        "\n".join(f"{value / MB:.2f}" for value in fits[-1].optimizer),
        "\n".join(f"{value / MB:.2f}" for value in fits[-1].gradients),
        plus_minus(list(by_seed(fits).values())),
    ]


def notes(result: Result) -> list[str]:
    """What the marks mean, and what is missing."""
    found = [
        "Three lines: the thirds of the run; optimizer and gradients at their ends.",
        "Least by its arithmetic: what the schedule must compute at the speed of full fine-tuning "
        "in the same round. Frozen layers at the bottom are free after their first epoch, a "
        "backward pass goes as deep as something trains, an update costs what it does there. "
        "Reached: that time over the run's.",
    ]
    if any(any(fit.dropout) for fits in result.fits.values() for fit in fits):
        found.append("* leaves dropout on in frozen layers in some stage; all others turn it off.")
    found += [f"{c.name}: {c.note}." for c in CONTENDERS if c.key in result.fits and c.note]
    for key, fits in result.fits.items():
        aside = {fit.cache.get("aside") for fit in fits} - {None, ""}
        found += [f"{find(key).name}: the cache stepped aside ({reason})." for reason in aside]
    return found + result.left_out


def sentences(result: Result) -> list[str]:
    """The comparisons that the benchmark is for, where both sides took part."""
    comparisons: list[tuple[str, str, Callable[[list[Fit], list[Fit]], str]]] = [
        ("hand", "ours", _same_losses),
        ("hand", "cache", _same_losses),
        ("hand", "ours", _steps),
        ("fts", "cache", _staged),
        ("fts-eval", "cache", _staged),
        ("full", "freeze", _against_full),
        ("full", "autofreeze", _against_full),
    ]
    return [
        f"{find(other).name} against {find(one).name}: "
        + tell(result.fits[one], result.fits[other])
        for one, other, tell in comparisons
        if result.fits.get(one) and result.fits.get(other)
    ]


def _same_losses(one: list[Fit], other: list[Fit]) -> str:
    apart = max(
        abs(a - b) / max(abs(a), 1e-12)
        for first, second in zip(one, other)
        for a, b in zip(first.losses, second.losses, strict=True)
    )
    return f"losses of all steps differ by at most {apart:.0e} (relative)."


def _steps(one: list[Fit], other: list[Fit]) -> str:
    told = []
    for stage, name in enumerate(("head", "top 2 layers", "everything")):
        ratios = Spread.of([b.steps[stage] / a.steps[stage] for a, b in zip(one, other)])
        sizes = [(f[-1].optimizer[stage], f[-1].gradients[stage]) for f in (one, other)]
        same = "equal" if sizes[0] == sizes[1] else f"{sizes[1]} for {sizes[0]}"
        told.append(f"{name} {ratios.text(3)}, bytes of optimizer and gradients {same}")
    return f"time per step: {'; '.join(told)}."


def _staged(one: list[Fit], other: list[Fit]) -> str:
    return f"the whole staged run is {faster(one, other).text(2)} times as fast."


def _against_full(one: list[Fit], other: list[Fit]) -> str:
    full, ours = by_seed(one), by_seed(other)
    differences = [ours[seed] - full[seed] for seed in full if seed in ours]
    return (
        f"{faster(one, other).text(2)} times as fast, test accuracy "
        f"{plus_minus(list(ours.values()))} against {plus_minus(list(full.values()))} %; seed by "
        f"seed the difference is {plus_minus(differences)} points (mean ± standard error of "
        f"{len(differences)} seed{'' if len(differences) == 1 else 's'})."
    )
