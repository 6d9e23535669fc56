"""What the freezing callbacks of a fit declare -> what an audit holds the model against."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_freeze.audit.declared import Declared
from lightning_freeze.callbacks.fit_state import FitState


def declared_by(fit: FitState, ignored: Iterable[str]) -> Declared:
    """What is frozen now, and what belongs in eval mode; by flags where no callback freezes.

    Args:
        fit: has been started.
        ignored: names of which nothing is said.
    """
    assert fit.index is not None
    if not fit.managed or fit.applier is None:
        declared = Declared.by_flags(fit.index, fit.plan.frozen)
    else:
        kept = {id(module) for module in fit.applier.quiet}
        quiet = tuple(p for p, m in fit.index.modules.items() if id(m) in kept)
        declared = Declared(fit.plan.frozen, quiet, quiet)
    return declared.without(frozenset(ignored), fit.index)
