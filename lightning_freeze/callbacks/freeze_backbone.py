"""Keep the pretrained backbone, or all but its top layers, fixed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from lightning_freeze.arguments import call_of, positive, whole
from lightning_freeze.callbacks._lightning import (
    LightningModule,
    Trainer,
    is_fitting,
    rank_zero_warn,
)
from lightning_freeze.callbacks.base import FreezingCallback, key_of
from lightning_freeze.engine.flags import is_batch_norm
from lightning_freeze.errors import ArgumentError, ConflictError
from lightning_freeze.model.index import ModelIndex
from lightning_freeze.model.layer_groups import Anatomy, LayerGroup, backbone_at, discover
from lightning_freeze.model.selectors import as_selectors, select
from lightning_freeze.report.preview import SchedulePreview
from lightning_freeze.report.summary import groups_or_children
from lightning_freeze.schedule.schedule import Stage, UnfreezeSchedule

_DEFAULTS: dict[str, Any] = {
    "backbone": None,
    "trainable_layers": 0,
    "trainable": [],
    "train_bn": False,
    "eval_mode": True,
    "unfreeze_at_epoch": None,
    "lr_scale": 1.0,
}


class FreezeBackbone(FreezingCallback):
    """Freeze the backbone: no gradients, no optimizer state, eval mode, unchanged to the bit.

    Args:
        backbone: selectors of what to freeze; discovered where None (see `anatomy`). Of a model
            with several stacks one can be named, such as `"model.vision_tower"`. Adapters that
            PEFT added stay trainable unless they are named.
        trainable_layers: number of blocks at the top of the backbone that stay trainable, along
            with what stands above them in it (pooler, final norm); a negative number leaves as
            many blocks at the bottom trainable. Where stacks stand side by side, as those of
            CLIP do, it is counted in each.
        trainable: selectors of what stays trainable inside it, such as `"**.LayerNorm.*"`,
            `"type:LayerNorm"` or `"re:bias$"` (BitFit, https://arxiv.org/abs/2106.10199).
        train_bn: let batch-norm layers inside it train, weights and statistics.
        eval_mode: keep what is frozen in eval mode: dropout off, batch-norm statistics still.
            With False the modes are left alone, and the statistics move.
        unfreeze_at_epoch: release the backbone at this epoch, counted from 0: first a linear
            probe, then fine-tuning (LP-FT, Kumar et al. 2022, https://arxiv.org/abs/2202.10054).
        lr_scale: factor on the learning rate of the backbone.

    Raises:
        ArgumentError: an argument is wrong by itself (at construction), or `trainable_layers` is
            beyond the number of blocks (in `setup`).
        SelectorError, DiscoveryError, ConflictError: in `setup`; the model is left as it was.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[FreezeBackbone(trainable_layers=2)], logger=False)
    """

    def __init__(
        self,
        backbone: str | list[str] | None = None,
        *,
        trainable_layers: int = 0,
        trainable: str | list[str] | tuple[str, ...] = (),
        train_bn: bool = False,
        eval_mode: bool = True,
        unfreeze_at_epoch: int | None = None,
        lr_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.backbone = None if backbone is None else as_selectors(backbone, "backbone")
        if self.backbone == ():
            raise ArgumentError(
                "`backbone` is empty. Leave it out to have it discovered, or name what to freeze."
            )
        self.trainable_layers = whole(trainable_layers, "trainable_layers", least=None)
        self.trainable = as_selectors(trainable, "trainable")
        self.train_bn = train_bn
        self.eval_mode = eval_mode
        self.unfreeze_at_epoch = (
            None
            if unfreeze_at_epoch is None
            else whole(unfreeze_at_epoch, "unfreeze_at_epoch", least=1)
        )
        self.lr_scale = positive(lr_scale, "lr_scale")

    @property
    def state_key(self) -> str:
        """Tells this callback's state in a checkpoint from that of another `FreezeBackbone`."""
        return call_of(
            "FreezeBackbone",
            _DEFAULTS,
            backbone=None if self.backbone is None else key_of(self.backbone),
            trainable_layers=self.trainable_layers,
            trainable=key_of(self.trainable),
            train_bn=self.train_bn,
            eval_mode=self.eval_mode,
            unfreeze_at_epoch=self.unfreeze_at_epoch,
            lr_scale=self.lr_scale,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the arguments against the model; nothing freezes yet."""
        super().setup(trainer, pl_module, stage)
        schedule = self._fit.schedules.get(self) if self._fit is not None else None
        if is_fitting(trainer) and schedule is not None and self.trainable:
            first = schedule.trainable(0)
            if not first:
                rank_zero_warn(
                    f"{self.state_key}: nothing inside the backbone stays trainable. What "
                    f"`trainable` selects, such as `{min(schedule.claimed)}`, is outside of it and "
                    "trains anyway."
                )

    def resolve(self, index: ModelIndex, trainer: Trainer | None = None) -> UnfreezeSchedule:
        """The schedule for a model: all of the backbone but what stays trainable."""
        anatomy = discover(index) if self.backbone is None else backbone_at(index, self.backbone)
        kept = frozenset(self._top(anatomy))
        asked = frozenset(select(index, self.trainable)) if self.trainable else frozenset()
        core = frozenset(anatomy.backbone)
        norms = [
            (path, frozenset(index.within(module)))
            for path, module in index.modules.items()
            if self.train_bn and is_batch_norm(module)
        ]
        lively = [(path, own) for path, own in norms if own <= core]
        kept = kept | asked | frozenset().union(*(own for _, own in lively))
        stages = [Stage(0, kept & core)]
        if not core - kept:
            raise ConflictError(
                f"{self.state_key} freezes nothing: `trainable_layers` and `trainable` cover the "
                f"whole backbone ({len(core)} parameters). Leave the callback out, or name less."
            )
        if self.unfreeze_at_epoch is not None:
            stages.append(Stage(self.unfreeze_at_epoch, core))
        named = core if self.backbone is not None and self.unfreeze_at_epoch else frozenset()
        groups = {name: group.name for group in anatomy.groups for name in group.parameters}
        return UnfreezeSchedule(
            governed=core,
            stages=tuple(stages),
            lr_scale=dict.fromkeys(core, self.lr_scale) if self.lr_scale != 1.0 else {},
            claimed=asked | named,
            eval_mode=self.eval_mode,
            lively=frozenset(path for path, _ in lively),
            layer_group=groups,
            advice=self._advice(anatomy),
        )

    def _top(self, anatomy: Anatomy) -> Iterator[str]:
        """The blocks that `trainable_layers` leaves trainable, and what stands above them."""
        count, depth = self.trainable_layers, anatomy.depth
        if not count:
            return
        if abs(count) > depth:
            each = "each stack of " if anatomy.parallel else ""
            raise ArgumentError(
                f"`trainable_layers={count}` is beyond the {depth} blocks of {each}the "
                f"backbone ({_range(anatomy.blocks)}), found by {anatomy.rule}. Write a number "
                f"from {-depth} to {depth}."
            )
        for block in anatomy.top(count):
            yield from block.parameters
        if count > 0:
            yield from anatomy.above

    def _advice(self, anatomy: Anatomy) -> str:
        """What to write where the backbone is all there is: a bare model, or a tied head."""
        if anatomy.head or not anatomy.blocks:
            return ""
        named = "" if self.backbone is None else f"{key_of(self.backbone)!r}, "
        top = anatomy.top(1)[-1].name
        why = "the model has no head beside its backbone"
        if anatomy.tied:
            why = f"its head `{anatomy.tied[0]}` is one tensor with the input embedding"
        options = [f"`FreezeBackbone({named}trainable_layers=1)` to train `{top}` as well"]
        if anatomy.tied:
            options.append(
                f'`FreezeBackbone({named}trainable="{anatomy.tied[0]}")` to train that tensor'
            )
        if len(anatomy.stacks) > 1 and self.backbone is None:
            options.append(f'`FreezeBackbone("{anatomy.stacks[0].name}")` to freeze that alone')
        return f"{why}. Write {'; or '.join(options)}"

    def preview(
        self,
        model: nn.Module,
        max_epochs: int | None = None,
        *,
        inputs: Any = None,
        batch: int = 1,
    ) -> SchedulePreview:
        """What trains when in a model, and what a step costs, without a Trainer.

        Args:
            model: any module; it isn't changed.
            max_epochs: length of the run; as many as it takes to reach every stage where None.
            inputs: a batch as the model's `forward` takes it (a tensor, a tuple, or a mapping),
                for the cost of a step; guessed where None. Only shapes count.
            batch: samples in a guessed batch.

        Returns:
            A `SchedulePreview`, which prints as a table; `.plot()` draws it.

        Raises:
            FreezeError: as in `setup`, or `max_epochs` is no whole number from 1.
        """
        index = ModelIndex.of(model)
        schedule = self.resolve(index)
        length = schedule.stages[-1].at + 1 if max_epochs is None else max_epochs
        groups = groups_or_children(index)
        return SchedulePreview.with_cost(
            model, index, schedule, groups, length, inputs=inputs, batch=batch
        )

    @classmethod
    def lp_ft(cls, epoch: int = 1, lr_scale: float = 0.1) -> FreezeBackbone:
        """LP-FT: first a linear probe, then everything, the backbone at a lower rate.

        Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform
        Out-of-Distribution", https://arxiv.org/abs/2202.10054.

        Args:
            epoch: the epoch, counted from 0, at which the backbone begins to train.
            lr_scale: factor on the learning rate of the backbone.

        Example:
            >>> FreezeBackbone.lp_ft(3).state_key
            'FreezeBackbone(unfreeze_at_epoch=3, lr_scale=0.1)'
        """
        return cls(unfreeze_at_epoch=epoch, lr_scale=lr_scale)

    @classmethod
    def bitfit(cls) -> FreezeBackbone:
        """BitFit: the biases and the head train, nothing else.

        Ben Zaken et al. 2021, "BitFit: Simple Parameter-efficient Fine-tuning for
        Transformer-based Masked Language-models", https://arxiv.org/abs/2106.10199.

        Example:
            >>> FreezeBackbone.bitfit().state_key
            "FreezeBackbone(trainable=['re:bias$'])"
        """
        return cls(trainable="re:bias$")

    @classmethod
    def layer_norm_only(cls) -> FreezeBackbone:
        """The layer norms (RMS norms, too) and the head train, nothing else.

        Qi et al. 2022, "Parameter-Efficient Tuning on Layer Normalization for Pre-trained
        Language Models", https://arxiv.org/abs/2211.08682.

        Example:
            >>> FreezeBackbone.layer_norm_only().state_key
            "FreezeBackbone(trainable=['type:*LayerNorm*|*RMSNorm*'])"
        """
        return cls(trainable="type:*LayerNorm*|*RMSNorm*")

    @classmethod
    def batch_norm_only(cls, *, head: bool = True) -> FreezeBackbone:
        """The batch norms train, weights and statistics, and the head if asked; nothing else.

        Frankle et al. 2021, "Training BatchNorm and Only BatchNorm",
        https://arxiv.org/abs/2003.00152, do so in networks of random weights, head frozen.

        Args:
            head: whether the head trains as well.

        Example:
            >>> FreezeBackbone.batch_norm_only(head=False).state_key
            "FreezeBackbone(backbone=['**'], train_bn=True)"
        """
        return cls(train_bn=True) if head else cls("**", train_bn=True)

    @classmethod
    def surgical(cls, block: str | list[str]) -> FreezeBackbone:
        """Surgical fine-tuning: one block trains, and neither the rest nor the head.

        Lee et al. 2022, "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts",
        https://arxiv.org/abs/2210.11466: the first block for a shift of the input, a middle one
        for a shift of features, the last for a shift of the output.

        Args:
            block: selectors of what trains, such as `"layer1"` of a ResNet.

        Example:
            >>> FreezeBackbone.surgical("layer1").state_key
            "FreezeBackbone(backbone=['**'], trainable=['layer1'])"
        """
        return cls("**", trainable=block)


def _range(blocks: tuple[LayerGroup, ...]) -> str:
    if len(blocks) < 2:
        return blocks[0].name if blocks else "none"
    return f"{blocks[0].name} ... {blocks[-1].name}"
