"""Short ways to ask a summary."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from lightning_freeze import summarize
from lightning_freeze.report.summary import Summary


def states(model: nn.Module, origin: Any = None) -> dict[str, str]:
    """Name -> origin."""
    return of(summarize(model, origin=origin))


def of(summary: Summary) -> dict[str, str]:
    return {row.name: row.origin for row in summary.rows}


def counts(model: nn.Module, origin: Any = None) -> dict[str, int]:
    """Origin -> number of tensors."""
    return dict(Counter(states(model, origin).values()))


def new_ones(model: nn.Module, origin: Any = None) -> set[str]:
    return {name for name, state in states(model, origin).items() if state == "new"}
