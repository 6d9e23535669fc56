"""Arguments that are wrong by themselves: an error that names them, at construction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_freeze.errors import ArgumentError


def whole(value: object, argument: str, least: int | None) -> int:
    """A whole number, or an `ArgumentError` that names the argument."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or (least is not None and value < least)
    ):
        span = "" if least is None else f" from {least}"
        raise ArgumentError(f"`{argument}` is {value!r}. Write a whole number{span}.")
    return value


def one_of(value: str, argument: str, options: tuple[str, ...]) -> str:
    """One of some words, or an `ArgumentError` that names the argument."""
    if value not in options:
        listed = " or ".join(f'"{option}"' for option in options)
        raise ArgumentError(f"`{argument}` is {value!r}. Write {listed}.")
    return value


def positive(value: Any, argument: str) -> float:
    """A finite factor above 0, or an `ArgumentError` that names the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
        raise ArgumentError(
            f"`{argument}` is {value!r}. It is a factor on the learning rate and must be above 0; "
            "to keep something from training, don't unfreeze it."
        )
    return float(value)


def call_of(name: str, defaults: Mapping[str, Any], **given: Any) -> str:
    """A call with the arguments that aren't the default, the same text in every process.

    >>> call_of("FreezeBackbone", {"trainable_layers": 0, "lr_scale": 1.0}, trainable_layers=2)
    'FreezeBackbone(trainable_layers=2)'
    """
    shown = (f"{k}={v!r}" for k, v in given.items() if k not in defaults or v != defaults[k])
    return f"{name}({', '.join(shown)})"


def interval(every: Any) -> str | int:
    """When an audit checks, or an `ArgumentError`; a command line gives a number as text."""
    if every in ("epoch", "batch"):
        return str(every)
    if isinstance(every, str) and every.isdecimal():
        every = int(every)
    if isinstance(every, bool) or not isinstance(every, int):
        raise ArgumentError(
            f'`every` is {every!r}. Write "epoch", "batch" or a number of optimizer steps.'
        )
    return whole(every, "every", least=1)
