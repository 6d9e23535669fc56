"""What somebody declared a model to be, and what of it may change all the same."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from lightning_freeze.engine.flags import quiet_modules
from lightning_freeze.model.index import Members, ModelIndex
from lightning_freeze.model.selectors import Selectors, select
from lightning_freeze.schedule.plan import FreezePlan


@dataclass(frozen=True)
class Declared:
    """What somebody declared a model to be.

    Attributes:
        frozen: names of parameters that must not change.
        quiet: paths of modules that must be in eval mode.
        still: paths of modules whose buffers must not change.
        ignored: names of parameters and buffers of which nothing is declared.
    """

    frozen: frozenset[str]
    quiet: tuple[str, ...] = ()
    still: tuple[str, ...] = ()
    ignored: frozenset[str] = frozenset()

    @classmethod
    def by_flags(cls, index: ModelIndex, known: frozenset[str] = frozenset()) -> Declared:
        """What `requires_grad` says: for a freeze that was written by hand.

        Args:
            index: the model.
            known: names that are probably the same, to be kept once.
        """
        off = frozenset(n for n, p in index.parameters.items() if not p.requires_grad)
        off = known if known == off else off
        still = tuple(quiet_modules(index, FreezePlan(frozen=off, quiet=off)))
        in_eval = tuple(path for path in still if not index.modules[path].training)
        return cls(off, still if in_eval == still else in_eval, still)

    def without(self, ignored: frozenset[str], index: ModelIndex) -> Declared:
        """The same, but nothing of some tensors.

        Args:
            ignored: names of parameters and buffers.
            index: the model.
        """
        if not ignored:
            return self
        among = ignored.intersection(index.parameters)
        whole = set(quiet_modules(index, FreezePlan(frozen=among, quiet=among)))
        return Declared(
            self.frozen - ignored,
            tuple(path for path in self.quiet if path not in whole),
            tuple(path for path in self.still if path not in whole),
            ignored,
        )


def weights_in_buffers(index: ModelIndex, declared: Declared) -> tuple[str, ...]:
    """Paths of modules whose persistent buffers may be weights, such as a quantised layer's.

    A frozen module that belongs in eval mode holds its buffers still in any case. Of the others it
    is every module in which nothing trains, whether it has parameters or not and whatever is
    around it. By their kind, running statistics (batch-norm and what is like it), spectral norm's
    vectors and quantisation observers move in train mode, and are left out. What else a module
    writes by design (a queue, a codebook), it writes in the first step: who watches takes such
    buffers out again behind it.

    Args:
        index: the model.
        declared: what is frozen.
    """
    still = set(declared.still)
    off = declared.frozen | declared.ignored
    return tuple(
        path
        for path, module in index.modules.items()
        if path not in still
        and any(k not in module._non_persistent_buffers_set for k, _ in module._buffers.items())
        and not _moves_by_kind(module)
        and off.issuperset(index.within(module))
    )


def _moves_by_kind(module: nn.Module) -> bool:
    kind = type(module)
    return (
        "running_mean" in module._buffers
        or kind.__name__ == "_SpectralNorm"
        or any(type(hook).__name__ == "SpectralNorm" for hook in module._forward_pre_hooks.values())
        or any("ao.quantization" in base.__module__ for base in kind.__mro__)
    )


def redeclared(before: Declared, index: ModelIndex, *, trained: bool) -> Declared | None:
    """What `requires_grad` says at an epoch's border, where that is a new declaration.

    Whoever freezes and unfreezes by hand does it there: whole modules, in one direction, and
    something goes on training. Before anything has trained, any set of flags is one. Where single
    tensors of a module are flipped, or one part is swapped for another, somebody has to decide
    whether it is meant: None.

    Args:
        before: what was declared.
        index: the model, with the objects of then.
        trained: whether any batch has been trained on.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).requires_grad_(False)
        >>> _ = model[1].requires_grad_(True)
        >>> index = ModelIndex.of(model)
        >>> declared = Declared.by_flags(index)
        >>> _ = model[0].requires_grad_(True)
        >>> redeclared(declared, index, trained=True).frozen
        frozenset()
        >>> _ = model[0].bias.requires_grad_(False)
        >>> redeclared(declared, index, trained=True) is None
        True
    """
    now = Declared.by_flags(index, before.frozen).without(before.ignored, index)
    on, off = before.frozen - now.frozen, now.frozen - before.frozen
    if not (on or off) or not any(p.requires_grad for p in index.parameters.values()):
        return None
    if not trained:
        return now
    within = {
        path: index.within(index.modules[path]) for path in {index.owner(n) for n in on | off}
    }
    whole = all(
        len({index.parameters[name].requires_grad for name in names if name not in now.ignored}) < 2
        for names in within.values()
    )
    return now if whole and not (on and off) else None


def ignored_by(index: ModelIndex, selectors: Selectors) -> frozenset[str]:
    """Names of the parameters and buffers that some selectors match.

    Raises:
        SelectorError: one of them matches neither.

    Example:
        >>> from torch import nn
        >>> model = nn.ModuleDict({"head": nn.Linear(2, 1), "norm": nn.BatchNorm1d(1)})
        >>> sorted(ignored_by(ModelIndex.of(model), "norm.running_*"))
        ['norm.running_mean', 'norm.running_var']
    """
    if not selectors:
        return frozenset()
    buffers = dict(Members.of(index.modules[""]).buffers())
    everything = replace(
        index,
        parameters={**index.parameters, **buffers},  # type: ignore[dict-item]
        canonical={**index.canonical, **{name: name for name in buffers}},
    )
    return frozenset(select(everything, selectors))
