"""The tensors of a model that a checkpoint can hold, by the names that it would have there."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_freeze.model.index import ModelIndex

# PEFT's components: the tensor that it adapts, and the one that it trains a copy of
_ADAPTED = frozenset({"base_layer", "original_module"})


@dataclass(frozen=True)
class Stored:
    """The parameters and persistent buffers of a model.

    Attributes:
        index: the model.
        tensors: canonical name of a parameter, or name of a buffer -> tensor.
        canonical: every name that a state dict has for one of them -> the one in `tensors`.
    """

    index: ModelIndex
    tensors: dict[str, Tensor]
    canonical: dict[str, str]

    @classmethod
    def of(cls, index: ModelIndex) -> Stored:
        """Take them from an indexed model.

        >>> stored = Stored.of(ModelIndex.of(nn.BatchNorm1d(1)))
        >>> list(stored.tensors)
        ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
        """
        tensors: dict[str, Tensor] = {n: p for n, p in index.parameters.items() if not is_lazy(p)}
        canonical = {name: first for name, first in index.canonical.items() if first in tensors}
        for path, module in index.modules.items():
            for key, buffer in module._buffers.items():
                if (
                    buffer is not None
                    and key not in module._non_persistent_buffers_set
                    and not is_lazy(buffer)
                ):
                    name = f"{path}.{key}" if path else key
                    tensors[name] = buffer
                    canonical[name] = name
        return cls(index, tensors, canonical)

    @cached_property
    def plain(self) -> dict[str, str]:
        """Name without PEFT's components -> canonical name, where that is one tensor."""
        bare = {name: _plain(name) for name in self.canonical}
        count = Counter(bare.values())
        return {
            short if count[short] == 1 else name: self.canonical[name]
            for name, short in bare.items()
        }

    @cached_property
    def libraries(self) -> tuple[str, ...]:
        """Paths of the outermost transformers models."""
        found: list[str] = []
        for path, module in self.index.modules.items():
            inside = any(not outer or path.startswith(f"{outer}.") for outer in found)
            if is_transformers(module) and not inside:
                found.append(path)
        return tuple(found)

    def under(self, path: str) -> list[str]:
        """Canonical names of the tensors of which a name begins with a module's path."""
        names = self.canonical
        if path:
            return list(
                dict.fromkeys(first for n, first in names.items() if n.startswith(f"{path}."))
            )
        return list(self.tensors)


def is_transformers(module: nn.Module) -> bool:
    """Whether it is a `PreTrainedModel`; transformers needn't be installed to ask."""
    return hasattr(type(module), "base_model_prefix") and hasattr(module, "_init_weights")


def versions(tensor: Tensor) -> int:
    """How often torch saw an in-place write to a tensor, -1 where it doesn't count."""
    try:
        return tensor._version
    except RuntimeError:  # made in inference mode
        return -1


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _ADAPTED)
