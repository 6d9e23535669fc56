"""What discovery finds in a model: stem, stacks of blocks, what is above them, head.

A *stack* is a run of like blocks in one tower. A BERT has one; an encoder-decoder model, and a
multimodal model with a vision tower and a language model, have several, in data-flow order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_freeze.model.index import some


@dataclass(frozen=True)
class LayerGroup:
    """Parameters that freeze and unfreeze as one.

    Attributes:
        name: a module path where there is one, such as `bert.encoder.layer.0`, or `head`.
        parameters: dotted parameter names, in model order.
    """

    name: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Stack:
    """A tower of like blocks inside a model, such as `model.vision_tower`.

    Attributes:
        name: its module path, which `FreezeBackbone(name)` takes; empty for the whole model.
        blocks: its layers, bottom to top.
    """

    name: str
    blocks: tuple[LayerGroup, ...]


@dataclass(frozen=True)
class Anatomy:
    """What discovery found. It prints as a short text.

    Attributes:
        rule: which rule found it, in words.
        stem: parameters below the first block (embeddings), or None.
        blocks: the repeated layers of all stacks, bottom to top.
        above: backbone parameters above the last block (pooler, final norm).
        head: parameters outside the backbone.
        stacks: the blocks, tower by tower, in data-flow order.
        parallel: whether the stacks stand side by side, as those of CLIP do, instead of one on the
            other; then the top blocks are those at the top of each.
        adapters: parameters inside the backbone that PEFT added. They train with the head.
        tied: names of a head that shares its weights with the backbone, such as `lm_head.weight`.
    """

    rule: str
    stem: LayerGroup | None
    blocks: tuple[LayerGroup, ...]
    above: tuple[str, ...]
    head: tuple[str, ...]
    stacks: tuple[Stack, ...] = field(default=(), compare=False)
    parallel: bool = False
    adapters: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()

    @property
    def backbone(self) -> tuple[str, ...]:
        """Parameters of the backbone: stem, blocks and what is above them; no adapters."""
        groups = ((self.stem,) if self.stem else ()) + self.blocks
        core = tuple(name for group in groups for name in group.parameters) + self.above
        added = frozenset(self.adapters)
        return tuple(name for name in core if name not in added) if added else core

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        """Stem, blocks, and a group `head` that what stands above the blocks goes with."""
        top = self.above + self.head
        return (
            ((self.stem,) if self.stem else ())
            + self.blocks
            + ((LayerGroup("head", top),) if top else ())
        )

    @property
    def depth(self) -> int:
        """How many blocks can be counted from the top, or from the bottom."""
        if self.parallel:
            return min(len(stack.blocks) for stack in self.stacks)
        return len(self.blocks)

    def top(self, count: int) -> tuple[LayerGroup, ...]:
        """The top blocks; the bottom ones for a negative number; of each stack if parallel."""
        if not count:
            return ()
        towers = [stack.blocks for stack in self.stacks] if self.parallel else [self.blocks]
        return tuple(
            block for tower in towers for block in (tower[-count:] if count > 0 else tower[:-count])
        )

    def __str__(self) -> str:
        lines = [f"found by {self.rule}"]
        if self.stem:
            lines.append(f"stem    {self.stem.name}")
        for stack in self.stacks:
            ends = [block.name for block in (stack.blocks[0], stack.blocks[-1])]
            many = f"{len(stack.blocks)} block{'s' if stack.blocks[1:] else ''}"
            lines.append(f"blocks  {' ... '.join(dict.fromkeys(ends))} ({many})")
        for label, names in (("above", self.above), ("head", self.head)):
            owners = dict.fromkeys(name.rpartition(".")[0] or name for name in names)
            if owners:
                lines.append(f"{label:6}  {some(list(owners), 6)}")
        if self.tied and not self.head:
            lines.append(f"head    {self.tied[0]}, which is one tensor with the input embedding")
        if self.adapters:
            lines.append(f"adapters {len(self.adapters)} tensors in the blocks")
        return "\n".join(lines)
