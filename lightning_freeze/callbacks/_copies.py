"""What goes along when a callback is copied or pickled."""

from __future__ import annotations

from typing import Any

# methods of the model, which Lightning puts on every callback of a fit
_OF_THE_MODEL = ("log", "log_dict")


def own_state(callback: Any, **instead: Any) -> dict[str, Any]:
    """The attributes of a callback, without the model that it is fitted with.

    Args:
        callback: one of ours.
        instead: attributes that a copy has other values of.
    """
    kept = {name: value for name, value in vars(callback).items() if name not in _OF_THE_MODEL}
    return {**kept, **instead}


def forget_model(callback: Any) -> None:
    """At the end of a fit: a callback that is kept shouldn't keep the model."""
    for name in _OF_THE_MODEL:
        vars(callback).pop(name, None)
