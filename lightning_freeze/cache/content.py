"""Whether skipped modules are still frozen, in eval mode, unwatched, and what they were."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from lightning_freeze import accelerator
from lightning_freeze.audit.moods import minds_its_mode
from lightning_freeze.cache.calls import foreign_hooks
from lightning_freeze.digests import dense, digests


class Content:
    """What some modules are made of.

    Args:
        modules: with all that is in them.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        inner = list(dict.fromkeys(m for module in modules for m in module.modules()))
        self._inner = inner
        self._modes = [m for m in inner if minds_its_mode(m)]
        tensors = [t for m in inner for t in (*m._parameters.values(), *m._buffers.values())]
        self._tensors = list({id(t): t for t in tensors if t is not None}.values())
        self._versions = [t._version for t in self._tensors]
        self._digests = _digests(self._tensors)

    def usable(self) -> bool:
        """False where something trains, is in train mode or is hooked into."""
        if torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:
            return False
        if any(m.training for m in self._modes) or any(t.requires_grad for t in self._tensors):
            return False
        hooked = [m for m in self._inner if m._forward_hooks or m._forward_pre_hooks]
        return not any(foreign_hooks(m) for m in hooked)

    def changed(self, *, all_bytes: bool = False) -> bool:
        """Whether any tensor isn't what it was at the last question.

        Args:
            all_bytes: compare the bytes of all, instead of those of which torch says that they
                were written: it isn't told of writes through `.data`.
        """
        versions = [t._version for t in self._tensors]
        if not all_bytes and versions == self._versions:
            return False
        written = [
            position
            for position, (now, before) in enumerate(zip(versions, self._versions))
            if all_bytes or now != before
        ]
        self._versions = versions
        changed = False
        for position, digest in zip(written, _digests([self._tensors[p] for p in written])):
            changed = changed or digest != self._digests[position]
            self._digests[position] = digest
        return changed


def _digests(tensors: Sequence[Tensor]) -> list[bytes]:
    if tensors and all(accelerator.served(tensor.device) for tensor in tensors):
        flat = [dense(tensor, lambda: "a frozen tensor", here=False) for tensor in tensors]
        if all(isinstance(one, Tensor) for one in flat):
            return accelerator.reduced([one for one in flat if isinstance(one, Tensor)])
    return digests(tensors)
