"""What is frozen at one moment, as values: no tensor, no model, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class FreezePlan:
    """Which parameters are frozen, which of them want eval mode, and the lr factors.

    A plan is what one callback wants, or what several want together (`merge`).

    Attributes:
        frozen: names of the parameters that must not train.
        quiet: those of `frozen` whose modules belong in eval mode (dropout off, batch-norm
            statistics still).
        lively: names of batch-norm modules that stay in train mode all the same (`train_bn`).
        claimed: names that a selector of the user asked to train, now or later. They train even
            if the user had frozen them before the fit.
        lr_scale: name -> factor on the user's learning rate; 1.0 where absent.

    Example:
        >>> a = FreezePlan(frozen=frozenset({"x", "y"}), lr_scale={"x": 0.5})
        >>> b = FreezePlan(frozen=frozenset({"z"}), lr_scale={"x": 0.5, "z": 2.0})
        >>> merged = merge([a, b])
        >>> sorted(merged.frozen), merged.lr_scale
        (['x', 'y', 'z'], {'x': 0.25, 'z': 2.0})
    """

    frozen: frozenset[str] = frozenset()
    quiet: frozenset[str] = frozenset()
    lively: frozenset[str] = frozenset()
    claimed: frozenset[str] = frozenset()
    lr_scale: Mapping[str, float] = field(default_factory=dict)

    def trainable(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of `names` that train under this plan, in their order."""
        return tuple(name for name in names if name not in self.frozen)


def merge(plans: Iterable[FreezePlan], before: Iterable[str] = ()) -> FreezePlan:
    """Merge what several callbacks want: a parameter trains only if none of them freezes it.

    Args:
        plans: one plan per callback.
        before: names that the user froze before the fit; they stay frozen unless claimed.

    Returns:
        The plan that all of them together ask for.
    """
    listed = list(plans)
    claimed = frozenset().union(*(plan.claimed for plan in listed))
    kept = frozenset(before) - claimed
    scale: dict[str, float] = {}
    for plan in listed:
        for name, factor in plan.lr_scale.items():
            scale[name] = scale.get(name, 1.0) * factor
    frozen = kept.union(*(plan.frozen for plan in listed))
    # what the user froze keeps the mode that the user gave it
    quiet = frozenset[str]().union(*(plan.quiet for plan in listed))
    return FreezePlan(
        frozen=frozen,
        quiet=frozen if quiet == frozen else quiet,
        lively=frozenset().union(*(plan.lively for plan in listed)),
        claimed=claimed,
        lr_scale=scale,
    )
