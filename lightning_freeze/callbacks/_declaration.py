"""What the freezing callbacks of a session declare -> what an audit holds the model against."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_freeze.audit.declared import Declared
from lightning_freeze.callbacks.fit_state import Session


def declared_by(session: Session, ignored: Iterable[str]) -> Declared:
    """What is frozen now, and what belongs in eval mode; by flags where no callback freezes.

    Args:
        session: has been started.
        ignored: names of which nothing is said.
    """
    assert session.index is not None
    if not session.managed or session.applier is None:
        declared = Declared.by_flags(session.index, session.plan.frozen)
    else:
        kept = {id(module) for module in session.applier.quiet}
        quiet = tuple(p for p, m in session.index.modules.items() if id(m) in kept)
        declared = Declared(session.plan.frozen, quiet, quiet)
    return declared.without(frozenset(ignored), session.index)
