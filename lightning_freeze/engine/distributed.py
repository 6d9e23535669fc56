"""Several ranks: which strategies work, re-wrapping after a change, and one verdict for all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

from lightning_freeze.errors import ConflictError, UnsupportedError

T = TypeVar("T")

_REFUSED = {
    "FSDPStrategy": (
        "FSDP1 flattens parameters and fixes what requires a gradient when it wraps the model"
    ),
    "DeepSpeedStrategy": "DeepSpeed builds its own flat optimizer when it wraps the model",
    "XLAStrategy": "it has not been tested",
    "XLAFSDPStrategy": "it has not been tested",
}


def check_supported(strategy: Any) -> None:
    """Refuse strategies under which layers can't change while the fit runs.

    Raises:
        UnsupportedError: with the reason and what to use instead.
    """
    for base in type(strategy).__mro__:
        if base.__name__ in _REFUSED:
            raise UnsupportedError(
                f"`{type(strategy).__name__}` isn't supported: {_REFUSED[base.__name__]}. Use "
                '`ModelParallelStrategy` with `fully_shard` (FSDP2), `strategy="ddp"` or one '
                "device."
            )


def rewrap(strategy: Any) -> bool:
    """Build DistributedDataParallel anew, so that its reducer knows who trains.

    The reducer collects what requires a gradient when it is built: what unfreezes later would
    never be averaged, and the replicas would drift apart in silence (Lightning issue 20340).
    A communication hook stays, whoever registered it.

    Args:
        strategy: the trainer's; anything but a DDPStrategy is left alone.

    Returns:
        Whether it was rebuilt.
    """
    if not any(base.__name__ == "DDPStrategy" for base in type(strategy).__mro__):
        return False
    wrapped = strategy.model
    if not isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return False
    module = strategy.lightning_module
    for parameter in module.parameters():
        parameter.grad = None  # a gradient may be a view into the old reducer's buckets
    strategy.model = module
    strategy._pl_static_graph_delay_done = False
    hooks = list(getattr(wrapped, "_comm_hooks", ()))
    for state in [getattr(strategy, "_ddp_comm_state", None), *(state for _, state in hooks)]:
        _forget_buckets(state)
    strategy.configure_ddp()
    if not getattr(strategy.model, "_comm_hooks", True):  # else the strategy registers its own
        for hook, state in hooks:
            strategy.model.register_comm_hook(state, hook)
    return True


def _forget_buckets(state: Any) -> None:
    """PowerSGD remembers matrices in the shapes of buckets that there are no more."""
    memories = [getattr(state, f"{name}_dict", None) for name in ("error", "p_memory", "q_memory")]
    if all(isinstance(memory, dict) for memory in memories):
        for memory in memories:
            memory.clear()  # type: ignore[union-attr]
        # the reducer forms its buckets once more after its first step
        state.iter = min(state.iter, max(state.start_powerSGD_iter - 2, 0))


def rank() -> int:
    """This process's rank, 0 without torch.distributed."""
    return dist.get_rank() if several() else 0


@dataclass(frozen=True)
class _Failed:
    """What a rank sends instead of what the others wait for."""

    text: str


def from_all_ranks(item: T, about: str) -> list[T]:
    """One picklable object from each rank, in the order of ranks; a list of one on one process.

    Args:
        item: this rank's.
        about: what it is, in words: ranks that came to different places must not take one
            another's for it.

    Raises:
        ConflictError: another rank failed inside `together`, or is at another place.
    """
    if not several():
        return [item]
    heard: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(heard, (about, item))
    except Exception as error:
        raise known_to_all(error) from None  # there is nobody left to tell
    found = [sent for _, sent in heard]
    for number, sent in enumerate(found):
        if isinstance(sent, _Failed) and not isinstance(item, _Failed):
            raise known_to_all(
                ConflictError(f"Rank {number} can't go on, so no rank does. {sent.text}")
            )
    places: dict[str, list[str]] = {}
    for number, (place, sent) in enumerate(heard):
        if not isinstance(sent, _Failed):
            places.setdefault(place, []).append(str(number))
    if len(places) > 1:
        where = ", ".join(f"at {place} on {_numbered(ranks)}" for place, ranks in places.items())
        raise known_to_all(
            ConflictError(
                f"The ranks are no longer in step: {where}. One of them was stopped or left "
                "something out alone, such as by `trainer.should_stop` that isn't set on all of "
                "them, or by a batch more."
            )
        )
    return found


@contextmanager
def together(*, end: bool = True) -> Iterator[None]:
    """Raise on every rank if one raises inside; else it alone would, and the others wait for it.

    The rank that fails sends its error in place of what the others wait for: that is the next
    `from_all_ranks` inside, or the one at the end. So nothing else may communicate inside.

    Args:
        end: whether the ranks wait for each other at the end. Where the inside ends with
            `from_all_ranks`, and can't fail behind it, they have done so.

    Raises:
        ConflictError: on the ranks that didn't fail, with what the one that did has raised.
    """
    try:
        yield
    except Exception as error:
        if several() and not getattr(error, "known_to_all_ranks", False):
            known_to_all(error)
            from_all_ranks(_Failed(f"{type(error).__name__}: {error}"), "a failure")
        raise
    if end:
        from_all_ranks(None, "the end of a step that all take")


def known_to_all(error: Exception) -> Exception:
    """Mark an error that every rank raises by itself, or that has been sent: `together` doesn't."""
    vars(error)["known_to_all_ranks"] = True
    return error


def several() -> bool:
    """Whether there is more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def agree(told: Mapping[str, str], otherwise: str) -> None:
    """Raise on every rank if the ranks hold different things of a tensor.

    Args:
        told: name of a tensor -> what this rank holds of it, as "is frozen".
        otherwise: what a rank holds of a tensor that it doesn't name.

    Raises:
        ConflictError: with the tensors, and what each rank holds of them.
    """
    short = blake2b(repr(sorted(told.items())).encode(), digest_size=16).digest()
    if len(set(from_all_ranks(short, "the comparison of plans"))) == 1:
        return
    each = from_all_ranks(dict(told), "plans that differ")
    differing: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for names in each for name in names):
        held: dict[str, list[str]] = {}
        for number, names in enumerate(each):
            held.setdefault(names.get(name, otherwise), []).append(str(number))
        if len(held) > 1:
            text = ", ".join(f"{what} on {_numbered(ranks)}" for what, ranks in held.items())
            differing.setdefault(text, []).append(name)
    raise known_to_all(
        ConflictError(
            "The ranks don't agree on what trains. "
            + " ".join(f"{_some(names)} {text}." for text, names in differing.items())
            + f" {_ADVICE}"
        )
    )


def agree_on_callbacks(mine: str) -> None:
    """Raise on every rank if other callbacks communicate on one than on another.

    Args:
        mine: this rank's, in their order.

    Raises:
        ConflictError: with those of each rank.
    """
    each: dict[str, list[str]] = {}
    for number, theirs in enumerate(from_all_ranks(mine, "the comparison of callbacks")):
        each.setdefault(theirs, []).append(str(number))
    if len(each) > 1:
        told = "; ".join(f"{theirs} on {_numbered(ranks)}" for theirs, ranks in each.items())
        raise known_to_all(ConflictError(f"The ranks have other callbacks: {told}. {_ADVICE}"))


_ADVICE = "Give every rank the same callbacks with the same arguments."


def _numbered(ranks: list[str]) -> str:
    return f"rank{'s' if ranks[1:] else ''} {', '.join(ranks)}"


def _some(names: list[str], most: int = 3) -> str:
    listed = ", ".join(f"`{name}`" for name in names[:most])
    return f"{listed} and {len(names) - most} more:" if names[most:] else f"{listed}:"
