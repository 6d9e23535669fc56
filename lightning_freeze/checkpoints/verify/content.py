"""What `torch.load` gave -> its weights by name; no tensor among them is passed over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_freeze.checkpoints.verify.spelling import printable
from lightning_freeze.errors import VerifyError
from lightning_freeze.model.index import some

# where training loops put the weights beside the rest
_NESTED = ("state_dict", "model_state_dict", "model")
# what a module gives beside its tensors, of any form
_EXTRA = "_extra_state"


def tensors_of(content: Any, path: Path) -> tuple[str, dict[str, Tensor]]:
    """What a file is, in words, and the tensors of its state dict.

    What stands beside a state dict, such as the state of optimizers, isn't looked at.

    Raises:
        VerifyError: there is no state dict, or tensors in it that have no name of their own.
    """
    if isinstance(content, Mapping):
        for key in _NESTED:
            inside = content.get(key)
            if isinstance(inside, Mapping) and (found := _named(inside, path, f'["{key}"]')):
                lightning = "pytorch-lightning_version" in content
                return ("Lightning checkpoint" if lightning else "checkpoint"), found
        if found := _named(content, path):
            return "state dict", found
        keys = some(_keys(content), most=8) or "nothing"
        what = f"a dict with {keys}"
    else:
        what = f"one {type(content).__name__}"
    raise VerifyError(
        f"`{path}` holds {what}, but no tensors where weights stand: by name, or in a dict under "
        "`state_dict`. Save the model's `state_dict()` instead."
    )


def _named(content: Mapping[Any, Any], path: Path, inside: str = "") -> dict[str, Tensor]:
    """The tensors of a state dict; modules may keep other state of theirs in it."""
    found: dict[str, Tensor] = {}
    hidden: dict[Any, str] = {}
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            found[name] = value
            continue
        extra = isinstance(name, str) and name.rpartition(".")[2] == _EXTRA
        for full, tensor in _walk(value, str(name)):
            if extra and full not in content and full not in found:
                found[full] = tensor
            else:
                hidden.setdefault(name, full)
    if found and hidden:
        place = f"its `{inside[2:-2]}`" if inside else "it"
        keys, (key, full) = _keys(hidden), next(iter(hidden.items()))
        alone = "model.state_dict()"
        if isinstance(content[key], Mapping):
            alone = f'torch.load("{path}"){inside}[{key!r}]'
        raise VerifyError(
            f"`{path}` wasn't compared: {place} holds tensors by name, such as "
            f"`{printable(next(iter(found)))}`, and others under {some(keys)}, such as "
            f"`{printable(full)}`, that would be passed over. Save what is to be compared as a "
            f'state dict of its own, as by `torch.save({alone}, "weights.pt")`.'
        )
    return found


def _keys(content: Mapping[Any, Any]) -> list[str]:
    return [f"`{printable(str(key))}`" for key in content]


def _walk(content: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """All tensors in plain values, with dotted names; they may be deep, or hold themselves."""
    todo, seen = [(name, content)], set()
    while todo:
        at, value = todo.pop()
        if isinstance(value, Tensor):
            yield at, value
        elif isinstance(value, (Mapping, list, tuple, set, frozenset)) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            todo += [(f"{at}.{key}", inner) for key, inner in items]
