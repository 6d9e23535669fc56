"""Whether a monitored metric can be logged at all: found out before the first batch."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable
from typing import Any

from lightning_freeze.callbacks._lightning import (
    Trainer,
    is_a,
    is_overridden,
)
from lightning_freeze.callbacks.fit_state import callbacks_of
from lightning_freeze.errors import ArgumentError

# methods that run before training and may hand `self` on for other reasons than logging
_SETTING_UP = {"__init__", "setup", "configure_model", "configure_optimizers", "prepare_data"}
_NOT_OURS = {"torch", "math", "np", "numpy", "logging", "logger", "log", "wandb"}


def check_can_be_logged(monitor: str, trainer: Trainer) -> None:
    """Raise if nothing in this run can log `monitor`.

    That is known if no validation runs and the name is one of validation, or if every call of
    `log` in the module and the user's callbacks has a literal name and none is this one.

    Raises:
        ArgumentError: with the names that are logged.
    """
    module = trainer.lightning_module
    validates = is_overridden("validation_step", module) and trainer.limit_val_batches != 0
    if monitor.startswith("val") and not validates:
        raise ArgumentError(
            f"`monitor={monitor!r}` is never logged: this run has no validation. Give the module a "
            "`validation_step` and the fit validation data, or monitor a training metric."
        )
    names = _literal_names([module, *callbacks_of(trainer)])
    endings = ("_step", "_epoch", "/dataloader_idx_")
    if names is None or any(
        monitor == name or monitor.startswith(tuple(name + ending for ending in endings))
        for name in names
    ):
        return
    listed = ", ".join(sorted(names)) or "nothing"
    raise ArgumentError(
        f"`monitor={monitor!r}` is never logged. {type(module).__name__} logs: {listed}. Monitor "
        f'one of these, or call `self.log("{monitor}", ...)`.'
    )


def missing_metric(monitor: str, trainer: Trainer) -> ArgumentError:
    """The error for a metric that wasn't there when it should have been."""
    listed = ", ".join(sorted(trainer.callback_metrics)) or "none"
    return ArgumentError(
        f"`monitor={monitor!r}` was not logged. Metrics that exist: {listed}. Monitor one of "
        f'these, or call `self.log("{monitor}", ...)`.'
    )


def _literal_names(owners: Iterable[Any]) -> set[str] | None:
    """Every name that these objects log, or None where that can't be told from their source."""
    names: set[str] = set()
    for owner in owners:
        for kind in type(owner).__mro__:
            if kind.__name__ in ("LightningModule", "Callback", "object"):
                break
            if kind.__module__.startswith(
                ("lightning.", "pytorch_lightning.", "lightning_freeze.", "torch.")
            ):
                if is_a(owner, "LightningModule"):
                    continue
                break
            found = _names_in(kind)
            if found is None:
                return None
            names |= found
    return names


def _names_in(kind: type) -> set[str] | None:
    try:
        tree: Any = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return None
    names: set[str] = set()
    body = [item for item in tree.body[0].body if getattr(item, "name", "") not in _SETTING_UP]
    for node in (inner for item in body for inner in ast.walk(item)):
        if not isinstance(node, ast.Call):
            continue
        arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
        if any(isinstance(a, ast.Name) and a.id in ("self", "pl_module") for a in arguments):
            return None  # somebody else may log through it
        if not isinstance(node.func, ast.Attribute) or node.func.attr not in ("log", "log_dict"):
            continue
        if isinstance(node.func.value, ast.Name) and node.func.value.id in _NOT_OURS:
            continue
        found = _names_of_call(node)
        if found is None:
            return None
        names |= found
    return names


def _names_of_call(node: ast.Call) -> set[str] | None:
    named = {k.arg: k.value for k in node.keywords}
    first = node.args[0] if node.args else named.get("name", named.get("dictionary"))
    keys = list(first.keys) if isinstance(first, ast.Dict) else [first]
    names = {key.value for key in keys if isinstance(key, ast.Constant)}
    if len(names) != len(keys) or not all(isinstance(name, str) for name in names):
        return None
    return {str(name) for name in names}
