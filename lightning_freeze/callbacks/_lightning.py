"""Lightning under both of its names, `lightning.pytorch` and `pytorch_lightning`.

They are two copies of one release: no class of the one is a class of the other. Here neither is
imported, as the copy that is imported last takes over what they share, such as the logger through
which Lightning speaks. Our callbacks derive from the `Callback` of each copy that is loaded, from
the moment it is, and its other classes are told by their names.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING, Any

from lightning_utilities.core import overrides
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_freeze.errors import ConflictError

__all__ = ["Callback", "LightningModule", "Trainer", "rank_zero_info", "rank_zero_warn"]

_NAMESPACES = ("lightning.pytorch", "pytorch_lightning")
# what Lightning calls behind all other callbacks, if it is of its own namespace
_CALLED_LAST = ("Checkpoint", "EarlyStopping")

if TYPE_CHECKING:
    import lightning.pytorch as new
    import pytorch_lightning as old

    LightningModule = new.LightningModule | old.LightningModule
    Trainer = new.Trainer | old.Trainer

    class Callback(new.Callback, old.Callback):  # type: ignore[misc]
        """Lightning's `Callback`."""
else:
    LightningModule = Trainer = Any  # for annotations alone

    class _NoLightningYet:
        """A base that can be exchanged: Python doesn't allow that of `object`."""

    class Callback(_NoLightningYet):
        """Lightning's `Callback`, of each namespace that is loaded."""


class _Watch(MetaPathFinder):
    """Sees Lightning being imported, which imports many modules behind its callbacks.

    So a program that has imported Lightning finds ours derived from its `Callback`, whichever came
    first. To derive when one is made would be late: LightningCLI looks for subclasses by name.
    """

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        """Find nothing."""
        if fullname.startswith(_NAMESPACES):
            derive()


def derive() -> None:
    """Derive our `Callback` from those that are loaded."""
    loaded = [sys.modules.get(f"{name}.callbacks") for name in _NAMESPACES]
    found = (getattr(module, "Callback", None) for module in loaded)
    bases = tuple(kind for kind in found if kind is not None)
    if bases and bases != Callback.__bases__:
        Callback.__bases__ = bases


derive()
sys.meta_path.insert(0, _Watch())


def is_a(thing: object, name: str) -> bool:
    """Whether something is of a class of that name, in either namespace, or made of it."""
    return any(kind.__name__ == name for kind in type(thing).__mro__)


def is_overridden(method: str, module: LightningModule) -> bool:
    """Whether a module has a method of its own in place of LightningModule's."""
    base = next(k for k in reversed(type(module).__mro__) if k.__name__ == "LightningModule")
    return overrides.is_overridden(method, module, base)


def is_fitting(trainer: Trainer) -> bool:
    """Whether a trainer fits, rather than validates, tests or predicts."""
    return trainer.state.fn == "fit"


def check_namespaces(trainer: Trainer) -> None:
    """In `setup`: refuse a checkpoint callback or a stopper that the trainer doesn't know as one.

    It would be called among the others, and save what they haven't brought up to date.

    Raises:
        ConflictError: with the import to write.
    """
    ours = _namespace(type(trainer))
    for callback in trainer.callbacks:  # type: ignore[union-attr]
        kinds = [kind for kind in type(callback).__mro__ if _namespace(kind) not in ("", ours)]
        if kinds and any(is_a(callback, name) for name in _CALLED_LAST):
            name = kinds[0].__name__
            raise ConflictError(
                f"The Trainer is from `{ours}`, and `{name}` is from `{_namespace(kinds[0])}`: to "
                f"this Trainer it is no {name}, and is called before the callbacks that it has to "
                f"come after. Write `from {ours}.callbacks import {name}`."
            )


def _namespace(kind: type) -> str:
    """Which of the two names a class is imported under, or by what it is derived from."""
    modules = [base.__module__ for base in kind.__mro__]
    return next((n for m in modules for n in _NAMESPACES if m.startswith(f"{n}.")), "")
