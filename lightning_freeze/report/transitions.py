"""Moments of a fit -> what changed from one to the next, in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_freeze.report.timeline import Moment

_MOST = 3


@dataclass(frozen=True)
class Transition:
    """A change of who trains; the first is what a fit begins with.

    Attributes:
        epoch: counted from 0.
        step: optimizer steps so far.
        unfrozen: layer groups that begin to train.
        frozen: layer groups that stop.
        trainable: elements that train from now on; None where that wasn't recorded.
        first: whether the fit begins with it.
    """

    epoch: int
    step: int
    unfrozen: tuple[str, ...]
    frozen: tuple[str, ...]
    trainable: int | None = None
    first: bool = False

    def to_text(self, total: int | None = None) -> str:
        """One sentence.

        Args:
            total: elements of the whole model, for the share that trains.

        Example:
            >>> Transition(1, 40, ("layer.3",), (), 250).to_text(1000)
            'Epoch 1, step 40: `layer.3` begins to train. 250 of 1,000 parameters train (25.0 %).'
        """
        told = []
        if self.first:
            told.append(f"{_named(self.unfrozen)} train" + ("s" * (len(self.unfrozen) < 2)))
        elif self.unfrozen:
            told.append(f"{_named(self.unfrozen)} begin{'s' * (len(self.unfrozen) < 2)} to train")
        if self.frozen:
            told.append(f"{_named(self.frozen)} {'is' if len(self.frozen) < 2 else 'are'} frozen")
        if not told:
            told.append("other parameters of the same layer groups train")
        text = f"Epoch {self.epoch}, step {self.step}: {'; '.join(told)}."
        if self.trainable is None:
            return text
        if not total:
            return f"{text} {self.trainable:,} parameters train."
        share = 100 * self.trainable / total
        return f"{text} {self.trainable:,} of {total:,} parameters train ({share:.1f} %)."


def transition(before: Moment | None, after: Moment) -> Transition | None:
    """What changed between two moments, None where the same trains; `before` is None at first.

    Example:
        >>> a, b = Moment(0, 0, {"low": None, "top": 0.1}), Moment(1, 9, {"low": 0.01, "top": 0.1})
        >>> transition(a, b).unfrozen, transition(b, a).frozen, transition(a, a)
        (('low',), ('low',), None)
    """
    was = set() if before is None else _training(before)
    now = _training(after)
    unfrozen = tuple(group for group in after.lr if group in now - was)
    frozen = tuple(group for group in after.lr if group in was - now)
    same = before is not None and before.trainable == after.trainable
    if same and not unfrozen and not frozen:
        return None
    return Transition(after.epoch, after.step, unfrozen, frozen, after.trainable, before is None)


def transitions(moments: Iterable[Moment]) -> list[Transition]:
    """All changes of a fit, in the order of time."""
    found = []
    before: Moment | None = None
    for moment in moments:
        change = transition(before, moment)
        if change is not None:
            found.append(change)
        before = moment
    return found


def _training(moment: Moment) -> set[str]:
    return {group for group, lr in moment.lr.items() if lr is not None}


def _named(groups: Sequence[str]) -> str:
    """Layer groups in the order bottom to top; of many, the first and the last."""
    quoted = [f"`{group}`" for group in groups]
    if not quoted:
        return "nothing"
    if len(quoted) <= _MOST:
        return " and ".join(filter(None, (", ".join(quoted[:-1]), quoted[-1])))
    return f"{quoted[0]} to {quoted[-1]} ({len(quoted)} layer groups)"
