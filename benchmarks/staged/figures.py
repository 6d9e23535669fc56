"""What is told of the fits: rows of the table, and the sentences below it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.staged.contenders import CONTENDERS, find
from benchmarks.staged.fit import Fit, Wire
from benchmarks.staged.settings import STAGES, Settings

MB = 1e6
UNKNOWN = "-"


@dataclass
class Result:
    """All fits, round by round."""

    settings: Settings
    data: str
    fits: dict[str, list[Fit]] = field(default_factory=dict)
    wires: dict[str, Wire] = field(default_factory=dict)
    tensors: dict[str, list[int]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Spread:
    """The median of some figures, and their range."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def faster(slow: Sequence[Fit], quick: Sequence[Fit]) -> Spread:
    """How many times faster whole runs are, pair by pair within a round."""
    return Spread.of([one.seconds / other.seconds for one, other in zip(slow, quick)])


def by_seed(fits: Sequence[Fit]) -> dict[int, float]:
    """Per cent of the test texts sorted right, by seed."""
    found: dict[int, list[float]] = {}
    for fit in fits:
        found.setdefault(fit.seed, []).append(100 * fit.accuracy)
    return {seed: statistics.mean(values) for seed, values in found.items()}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error; the latter isn't a number for a single value."""
    if len(values) < 2:
        return statistics.mean(values), math.nan
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def plus_minus(values: Sequence[float]) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")


# ---------------------------------------------------------------- the table


def heads() -> list[str]:
    return [
        "contender",
        "whole run, s",
        "times as fast as by hand",
        "epochs",
        "first, s",
        "later, s",
        "peak, MB",
        "optimizer, MB",
        "gradients, MB",
        "all-reduced a step, MB",
        "test accuracy, %",
    ]


def rows(result: Result) -> list[list[str]]:
    """Cells with one line for each third of the run, or a single line."""
    hand = result.fits.get("hand")
    return [_row(result, key, fits, hand) for key, fits in result.fits.items() if fits]


def _row(result: Result, key: str, fits: list[Fit], hand: list[Fit] | None) -> list[str]:
    each = result.settings.epochs_per_stage
    firsts = [fits_median(fits, lambda f, i=i: f.epochs[each * i]) for i in range(STAGES)]
    laters = [
        fits_median(fits, lambda f, i=i: statistics.median(f.epochs[each * i + 1 : each * (i + 1)]))
        if each > 1
        else math.nan
        for i in range(STAGES)
    ]
    return [
        find(key).name + (" *" if any(fits[-1].dropout) else ""),
        f"{fits_median(fits, lambda f: f.seconds):.1f}",
        UNKNOWN if hand is None else faster(hand, fits).text(2),
        _lines([f"{each * i + 1} to {each * (i + 1)}" for i in range(STAGES)]),
        _lines([f"{value:.2f}" for value in firsts]),
        _lines([UNKNOWN if math.isnan(value) else f"{value:.2f}" for value in laters]),
        _lines(_peaks(fits)),
        _sizes(fits[-1].optimizer),
        _sizes(fits[-1].gradients),
        _reduced(result.wires.get(key)),
        plus_minus(list(by_seed(fits).values())),
    ]


def fits_median(fits: Sequence[Fit], figure: Callable[[Fit], float]) -> float:
    return statistics.median(map(figure, fits))


def _lines(texts: Sequence[str]) -> str:
    return "\n".join(texts)


def _peaks(fits: list[Fit]) -> list[str]:
    found = []
    for stage in range(STAGES):
        values = [peak for fit in fits if (peak := fit.peaks[stage]) is not None]
        found.append(f"{statistics.median(values) / MB:.0f}" if values else UNKNOWN)
    return found


def _sizes(values: Sequence[int]) -> str:
    return _lines([f"{value / MB:.2f}" for value in values])


def _reduced(wire: Wire | None) -> str:
    if wire is None or not wire.reduced:
        return UNKNOWN
    return _lines(
        [
            f"{reduced / MB:.2f}" + " !" * (reduced < needed) + " †" * wire.find_unused
            for reduced, needed in zip(wire.reduced, wire.gradients)
        ]
    )


def drifts(wire: Wire) -> bool:
    """Whether gradients that an optimizer uses aren't reduced."""
    return any(reduced < needed for reduced, needed in zip(wire.reduced, wire.gradients))


# ---------------------------------------------------------------- the sentences


def notes(result: Result) -> list[str]:
    """What the marks mean, and what is missing."""
    found = [
        "Three lines: the thirds of the run; optimizer and gradients at their ends. Peak: resident "
        "memory in a third, above what the process had before the model was made. All-reduced: "
        "counted by a communication hook, in a run of its own with one rank."
    ]
    if any(any(fit.dropout) for fits in result.fits.values() for fit in fits):
        found.append("* leaves dropout on in frozen layers in some stage; all others turn it off.")
    wires = [wire for wire in result.wires.values() if wire.reduced]
    if any(map(drifts, wires)):
        found.append("! fewer bytes than the gradients that are used: ranks would drift apart.")
    if any(wire.find_unused for wire in wires):
        found.append("† can't run without `find_unused_parameters`.")
    for key, wire in result.wires.items():
        if not wire.reduced and wire.error:
            found.append(f"{find(key).name}, all-reduced: not measured ({wire.error}).")
    found += [f"{c.name}: {c.note}." for c in CONTENDERS if c.key in result.fits and c.note]
    for key, fits in result.fits.items():
        aside = {fit.cache.get("aside") for fit in fits} - {None, ""}
        found += [f"{find(key).name}: the cache stepped aside ({reason})." for reason in aside]
    return found + result.left_out


def sentences(result: Result) -> list[str]:
    """The comparisons that the benchmark is for, where both sides took part."""
    comparisons: list[tuple[str, str, Callable[[list[Fit], list[Fit]], list[str]]]] = [
        ("hand", "ours", _same_losses),
        ("hand", "cache", _same_losses),
        ("fts", "cache", _staged),
        ("fts-eval", "cache", _staged),
        ("full", "freeze", _against_full),
        ("full", "autofreeze", _against_full),
        ("hand", "ours", _no_waste),
    ]
    found = [
        text
        for one, other, tell in comparisons
        if result.fits.get(one) and result.fits.get(other)
        for text in tell(result.fits[one], result.fits[other])
    ]
    if {"hand", "ours"} <= result.tensors.keys():
        pairs = zip(result.tensors["hand"], result.tensors["ours"])
        peaks = "; ".join(
            f"{one:,} and " + ("the same" if one == other else f"{other:,}") for one, other in pairs
        )
        found.append(
            "Peak of tensors above the model's own, by hand and with GradualUnfreeze, in bytes, in "
            f"a profiled run of two steps an epoch: {peaks}."
        )
    return found


def _names(one: list[Fit], other: list[Fit]) -> str:
    return f"{find(other[0].key).name} against {find(one[0].key).name}"


def apart(one: Sequence[Fit], other: Sequence[Fit]) -> float:
    """The largest relative difference of two losses at the same step."""
    return max(
        abs(a - b) / max(abs(a), 1e-12)
        for first, second in zip(one, other)
        for a, b in zip(first.losses, second.losses, strict=True)
    )


def _same_losses(one: list[Fit], other: list[Fit]) -> list[str]:
    return [
        f"{_names(one, other)}: losses of all steps differ by at most {apart(one, other):.0e} "
        "(relative)."
    ]


def _staged(one: list[Fit], other: list[Fit]) -> list[str]:
    return [
        f"{_names(one, other)}: the whole staged run is {faster(one, other).text(2)} times as fast "
        "(aim: 1.35)."
    ]


def _against_full(one: list[Fit], other: list[Fit]) -> list[str]:
    full, ours = by_seed(one), by_seed(other)
    differences = [ours[seed] - full[seed] for seed in full if seed in ours]
    return [
        f"{_names(one, other)}: {faster(one, other).text(2)} times as fast (aim: 2), test accuracy "
        f"{plus_minus(list(ours.values()))} against {plus_minus(list(full.values()))} %; seed by "
        f"seed the difference is {plus_minus(differences)} points (mean ± standard error of "
        f"{len(differences)} seed{'' if len(differences) == 1 else 's'})."
    ]


def _no_waste(one: list[Fit], other: list[Fit]) -> list[str]:
    found = []
    for stage, name in enumerate(("head", "top 2 layers", "everything")):
        steps = Spread.of([b.steps[stage] / a.steps[stage] for a, b in zip(one, other)])
        text = f"{_names(one, other)}, {name}: time per step {steps.text(3)} of it"
        if all(f.peaks[stage] is not None for f in [*one, *other]):
            more = Spread.of(
                [((b.peaks[stage] or 0) - (a.peaks[stage] or 0)) / MB for a, b in zip(one, other)]
            )
            text += f", resident peak {more.median:+.1f} ({more.low:+.1f} to {more.high:+.1f}) MB"
        text += _difference("optimizer", one[-1].optimizer[stage], other[-1].optimizer[stage])
        text += _difference("gradients", one[-1].gradients[stage], other[-1].gradients[stage])
        found.append(text + ".")
    return found


def _difference(what: str, one: int, other: int) -> str:
    return f", {what} " + ("equal" if one == other else f"{other - one:+,}") + " bytes"
