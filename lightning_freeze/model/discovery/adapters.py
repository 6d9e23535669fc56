"""Which parameters of a model PEFT has added to it: LoRA's matrices, and copies to train."""

from __future__ import annotations

from lightning_freeze.model.index import ModelIndex


def is_wrapped(index: ModelIndex) -> bool:
    """Whether PEFT's own wrapper is somewhere in the model: what it added is there to train."""
    return any(base.__name__ == "PeftModel" for kind in index.kinds for base in kind.__mro__)


def adapter_names(index: ModelIndex, path: str = "") -> tuple[str, ...]:
    """Names of the parameters under `path` that belong to an adapter, in model order.

    PEFT's layers list them in `adapter_layer_names`
    (https://huggingface.co/docs/peft/developer_guides/custom_models); so do the modules that hold
    a copy to train (`modules_to_save`). A parameter whose name begins with `lora_` is one, too.
    """
    prefix = path + "." if path else ""
    places: set[str] = set()
    peft = frozenset(kind for kind in index.kinds if any(map(_of_peft, kind.__mro__)))
    for name, module in index.modules.items() if peft else ():
        if type(module) in peft and name.startswith(prefix):
            own = getattr(module, "adapter_layer_names", ())
            places.update(f"{name}.{part}" if name else part for part in own)
    likely = [name for name in index.parameters if places or "lora_" in name]
    return tuple(name for name in likely if name.startswith(prefix) and _added(name, places))


def _of_peft(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "peft"


def _added(name: str, places: set[str]) -> bool:
    if ".lora_" in name or name.startswith("lora_"):
        return True
    parts = name.split(".")
    return any(".".join(parts[:depth]) in places for depth in range(1, len(parts) + 1))
