"""Which parameters of a model PEFT has added to it: LoRA's matrices, and copies to train."""

from __future__ import annotations

from lightning_freeze.names import ModelIndex


def is_wrapped(index: ModelIndex) -> bool:
    """Whether PEFT's own wrapper is somewhere in the model: what it added is there to train."""
    kinds = {base.__name__ for module in index.modules.values() for base in type(module).__mro__}
    return "PeftModel" in kinds


def adapter_names(index: ModelIndex, path: str = "") -> tuple[str, ...]:
    """Names of the parameters under `path` that belong to an adapter, in model order.

    PEFT's layers list them in `adapter_layer_names`
    (https://huggingface.co/docs/peft/developer_guides/custom_models); so do the modules that hold
    a copy to train (`modules_to_save`). A parameter whose name begins with `lora_` is one, too.
    """
    prefix = path + "." if path else ""
    places: set[str] = set()
    for name, module in index.modules.items():
        kinds = type(module).__mro__
        if name.startswith(prefix) and any(k.__module__.split(".")[0] == "peft" for k in kinds):
            own = getattr(module, "adapter_layer_names", ())
            places.update(f"{name}.{part}" if name else part for part in own)
    return tuple(
        name for name in index.parameters if name.startswith(prefix) and _added(name, places)
    )


def _added(name: str, places: set[str]) -> bool:
    parts = name.split(".")
    if any(part.startswith("lora_") for part in parts):
        return True
    return any(".".join(parts[:depth]) in places for depth in range(1, len(parts) + 1))
