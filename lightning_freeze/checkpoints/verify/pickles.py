"""What `torch.save` wrote, read without running any of it."""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from lightning_freeze.checkpoints.verify.formats import can_be_mapped, is_zip, protocol
from lightning_freeze.errors import VerifyError

_NAMED = re.compile(r"GLOBAL (\S+)")
_ENVIRONMENT = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
# what torch's safe reader doesn't know is of a later protocol than its own
_UNKNOWN = "Unsupported operand"
_PROTOCOL = 2


def load(path: Path) -> Any:
    """Load tensors and plain values; tensors stay on the disk until they are read.

    `weights_only=True` is given outright: `TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD` has a say only where
    a call leaves it out.

    Raises:
        VerifyError: the file asks for more than tensors and plain values, or is damaged.
    """
    mapped = is_zip(path) and can_be_mapped(path)
    try:
        with warnings.catch_warnings():
            # torch warns of a pickle protocol that it then can't read
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise _refused(path, str(error)) from None
    except Exception as error:  # a damaged pickle fails in any way it likes
        first = (str(error) or type(error).__name__).splitlines()[0]
        if _ENVIRONMENT in first:
            raise VerifyError(
                f"`{path}` can't be read, for torch refuses its environment: {first} Unset both."
            ) from None
        raise VerifyError(
            f"`{path}` can't be read: it is cut off or damaged (torch says: {first}). Get it "
            "again, or take an earlier checkpoint."
        ) from error


def _refused(path: Path, message: str) -> VerifyError:
    if _UNKNOWN in message and (found := protocol(path)) > _PROTOCOL:
        return VerifyError(
            f"`{path}` was saved with pickle protocol {found}; torch reads only protocol "
            f"{_PROTOCOL} without running code. Save it with the default: `torch.save` without "
            "`pickle_protocol`."
        )
    named = _NAMED.search(message)
    if named is None:
        last = message.partition("WeightsUnpickler error: ")[2].strip() or message.splitlines()[0]
        return VerifyError(
            f"`{path}` holds something else than tensors and plain values, or is damaged (torch "
            f"says: {last.splitlines()[0]}). Nothing of it was executed."
        )
    return VerifyError(
        f"`{path}` was refused: to read it, `{named[1]}` would have to be called, and a file that "
        "may call functions can run any code. Nothing of it was executed. If you trust where it "
        "comes from, save its weights alone, and verify those: "
        f'`torch.save(torch.load("{path}", weights_only=False)["state_dict"], "weights.pt")`.'
    )
