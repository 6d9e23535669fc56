"""How the tensors of a run lie in its optimizers' groups, and whether a checkpoint's lie so, too.

torch restores the state of optimizers by place: what lies otherwise, but in groups of the same
sizes, would get the moments and learning rates of other tensors, and nothing would say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_freeze.engine.optimizers import FACTOR, OptimizerGroups, whole_groups


@dataclass(frozen=True)
class Layout:
    """What lies where, for each optimizer and each of its groups.

    Attributes:
        counts: how many tensors the group holds now.
        members: the places of these in the user's own groups, counted through; no names, so that
            a layer may be renamed.
        origins: the place of the user's group that it is a part of.
        factors: the factor on its learning rate.
        names: the names of all tensors of each optimizer, by place.
    """

    counts: list[list[int]]
    members: list[list[list[int]]]
    origins: list[list[int]]
    factors: list[list[float]]
    names: list[list[str]]

    @classmethod
    def of(cls, groups: OptimizerGroups) -> Layout:
        """How it is now."""
        whole = [
            [p for group in whole_groups(optimizer) for p in group]
            for optimizer in groups.optimizers
        ]
        members: list[list[list[int]]] = []
        for optimizer, parameters in zip(groups.optimizers, whole):
            place = {id(parameter): number for number, parameter in enumerate(parameters)}
            held = [
                [place.get(id(p), -1) for p in group["params"]] for group in optimizer.param_groups
            ]
            members.append(held)
        return cls(
            counts=[[len(group) for group in held] for held in members],
            members=members,
            origins=groups.origins(),
            factors=[
                [float(group.get(FACTOR, 1.0)) for group in optimizer.param_groups]
                for optimizer in groups.optimizers
            ],
            names=[[groups.index.name_of.get(id(p), "") for p in held] for held in whole],
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for a checkpoint."""
        return {
            "layout": self.counts,
            "members": self.members,
            "origins": self.origins,
            "factors": self.factors,
        }

    def difference(self, saved: Mapping[str, Any]) -> str:
        """What a checkpoint has otherwise and what to do; nothing where it fits.

        Args:
            saved: what `to_dict` gave; keys that an older version didn't write are passed over.
        """
        changed = (
            "The callbacks, the model or `configure_optimizers` have changed since. Use the "
            "arguments of the run that wrote it"
        )
        if saved.get("layout") not in (None, self.counts):
            return (
                f"its optimizer groups hold {saved['layout']} tensors, those of this run "
                f"{self.counts}. {changed}"
            )
        if saved.get("members") not in (None, self.members):
            return f"an optimizer group of this run {self._swapped(saved['members'])}. {changed}"
        if saved.get("origins") not in (None, self.origins):
            return (
                f"its optimizer groups come from the user's groups {saved['origins']}, and those "
                f"of this run from {self.origins}. {changed}"
            )
        # torch would take those of the checkpoint, and say nothing
        if saved.get("factors") not in (None, self.factors):
            return (
                f"it has the factors {saved['factors']} on the learning rates of its groups, and "
                f"this run {self.factors}. Use the `lr_decay` and `lr_scale` of the run that wrote "
                "it"
            )
        return ""

    def _swapped(self, saved: list[list[list[int]]]) -> str:
        """The first two tensors that differ; groups are known to be of the same sizes."""
        for names, ours, theirs in zip(self.names, self.members, saved):
            for held, other in zip(ours, theirs):
                for mine, its in zip(held, other):
                    if mine != its:
                        return f"holds `{names[mine]}` where the checkpoint's holds `{names[its]}`"
        return "holds other tensors than the checkpoint's"
