"""A frozen tensor that changed -> who did it, and what to do about it.

The answer is what was seen: an optimizer's update, a write between two looks, a copy with the same
bytes, a tensor in the same memory. Where nobody watched, it is what can still be told afterwards:
a gradient, optimizer state, a version counter, an address.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lightning_freeze.audit.baseline import Baseline, address
from lightning_freeze.audit.numbers import all_zero
from lightning_freeze.audit.scene import Scene
from lightning_freeze.audit.trace import (
    BEGIN,
    END,
    EPOCH,
    EPOCH_END,
    FIT,
    FIT_END,
    SAVED,
    START,
    UPDATE,
    UPDATED,
    VALIDATED,
    VALIDATION,
    Update,
    Write,
    of_torch,
)
from lightning_freeze.digests import digest
from lightning_freeze.engine.flags import is_batch_norm

Why = tuple[str, str]

_OR_MEANT = "; if it is meant to change (a momentum encoder, a codebook), name it in `ignore`"
_FIND_WRITE = (
    f"Find an in-place write (`copy_`, `mul_`, `load_state_dict`) to this tensor{_OR_MEANT}."
)

_PARTS = {
    (BEGIN, FIT): "before the fit's first batch",
    (FIT, EPOCH): "before the fit's first batch",
    (START, UPDATE): "in the forward or backward pass of a batch",
    (START, UPDATED): "in a batch",
    (START, END): "in a batch",
    (UPDATE, UPDATED): "between the gradients' last use and the end of the optimizer's update",
    (UPDATED, END): "between the optimizer's update and the batch's end",
    (END, START): "between two batches",
    (EPOCH, START): "before the epoch's first batch",
    (END, EPOCH_END): "at an epoch's end",
    (VALIDATED, EPOCH_END): "between validation and the epoch's end",
    (EPOCH_END, EPOCH): "between two epochs",
    (VALIDATION, VALIDATED): "during validation",
    (END, SAVED): "when a checkpoint was saved",
    (EPOCH_END, FIT_END): "after the last epoch",
}


# parts of a fit in which no forward pass runs, or only in eval mode
_NO_FORWARD = {
    (VALIDATION, VALIDATED),
    (UPDATE, UPDATED),
    (UPDATED, END),
    (END, START),
    (END, EPOCH_END),
    (VALIDATED, EPOCH_END),
    (EPOCH_END, EPOCH),
    (EPOCH_END, FIT_END),
    (EPOCH, START),
}


def part_of_fit(after: str, before: str) -> str:
    """Two looks -> what a loop does between them, in words."""
    return _PARTS.get((after, before), f"between {after} and {before}")


def why_changed(baseline: Baseline, position: int, scene: Scene) -> Why:
    """The cause and the fix for a frozen parameter that changed.

    Args:
        baseline: what it was.
        position: which tensor of the baseline.
        scene: what can be looked at.
    """
    name = baseline.names[position]
    tensor = baseline.tensor(position)
    assert tensor is not None
    trace = scene.trace
    update = trace.updates.get(name) if trace else None
    if update is None:
        update = _afterwards(baseline, position, scene)
    if update is not None:
        if update.gradient != "none" and not update.flag and name in scene.reduced:
            return (
                f"{update.optimizer} holds it, and DistributedDataParallel gives it a gradient at "
                "each step: it required one when the model was wrapped.",
                "Freeze through these callbacks, which wrap the model anew, or before the fit.",
            )
        return _by_optimizer(update, _turned_on(name, scene), now=tensor.requires_grad)
    partner = scene.shared.get(name)
    if partner is not None:
        return (
            f"It shares its memory with `{partner}`, which trains: one tensor in two Parameters.",
            f"Freeze `{partner}`, too, or give each memory of its own (`.clone()`).",
        )
    write = trace.writes.get(name) if trace else None
    if write is None and trace is not None and name in scene.twins:
        write = trace.writes.get(scene.twins[name])  # a write to the one is one to the other
    average = _average_with(name, tensor, scene)
    if average is not None:
        return average
    dtype, shape = baseline.form(position)
    if tensor.dtype != dtype or tensor.shape != shape:
        was, now = str(dtype).removeprefix("torch."), str(tensor.dtype).removeprefix("torch.")
        what = f"{tuple(tensor.shape)} instead of {tuple(shape)}"
        if tensor.dtype != dtype:
            what = f"{now} instead of {was}" + (f", {what}" if tensor.shape != shape else "")
        return (
            f"It was given another shape or dtype: it is {what} now{_where(write, scene)}.",
            "Resize or convert before the fit (`setup`, `configure_model`).",
        )
    if address(tensor) != baseline.address(position):
        return (
            "Its memory was exchanged: `.data` was assigned anew"
            f"{_where(write, scene)}, as `vector_to_parameters`, `to()` and offloading do.",
            "Find what assigns `.data` of this tensor, and leave frozen ones out.",
        )
    if write is not None and not write.silent:
        return (
            f"It was written in place by other code{_where(write, scene)}.",
            _FIND_WRITE,
        )
    if write is not None or tensor._version == baseline.versions[position]:
        return (
            "No optimizer wrote it and its version didn't change: it was written through `.data` "
            f"or from outside of autograd{_where(write, scene)}.{_or_by(tensor, scene)}",
            f"Find code that writes `.data` of this tensor{_OR_MEANT}.",
        )
    return (
        "No optimizer wrote it: it was written in place by other code.",
        _FIND_WRITE,
    )


def _or_by(tensor: Tensor, scene: Scene) -> str:
    """An optimizer that isn't torch's may write so, in a step in which it wasn't read."""
    holder = scene.holder(tensor)
    if holder is None or of_torch(holder):
        return ""
    return f" {type(holder).__name__}, which holds it and isn't torch's own, may do that."


def _where(write: Write | None, scene: Scene) -> str:
    return "" if write is None else when(write.after, write.before, scene.who)


def when(after: str, before: str, who: Callable[[str, str], str]) -> str:
    """Two looks -> between which parts of the fit, and whose code runs there, to end a sentence."""
    runs = who(after, before)
    return f", {part_of_fit(after, before)}{f' (there: {runs})' if runs else ''}"


def _afterwards(baseline: Baseline, position: int, scene: Scene) -> Update | None:
    """Whether an optimizer must have written it, told from what it left behind.

    Only where nobody watched the optimizer: torch's own leave a tensor without a gradient alone.
    """
    parameter = baseline.tensor(position)
    assert parameter is not None
    optimizer = scene.holder(parameter)
    watched = scene.trace is not None and scene.trace.stepped
    if optimizer is None or watched:
        return None
    kind = type(optimizer)
    bumped = parameter._version != baseline.versions[position]
    gradient = parameter.grad
    if gradient is not None:
        state = "zero" if all_zero(gradient) else "some"
        return Update(kind.__name__, state, parameter.requires_grad, (0, 0))
    if optimizer.state.get(parameter) and (bumped or parameter.requires_grad):
        return Update(kind.__name__, "some", parameter.requires_grad, (0, 0))
    if bumped and not of_torch(optimizer):
        return Update(kind.__name__, "none", parameter.requires_grad, (0, 0))
    return None


def _turned_on(name: str, scene: Scene) -> str:
    flip = scene.trace.flips.get(name) if scene.trace else None
    return "" if flip is None else when(flip.after, flip.before, scene.who)


def _by_optimizer(update: Update, turned_on: str, *, now: bool) -> Why:
    name = update.optimizer
    if update.flag:
        is_on = "is True" if now else "was True for a time"
        return (
            f"`requires_grad` {is_on}: other code turned it on{turned_on}, and {name} holds it.",
            "Find what sets `requires_grad` and leave that to one callback.",
        )
    if update.gradient == "some":
        return (
            f"{name} holds it and it has a stale gradient, which each step applies.",
            "Set `.grad = None` when you freeze, as `lightning_freeze.freeze` does.",
        )
    if update.gradient == "zero":
        return (
            f"{name} holds it and it has a stale gradient of zeros: weight decay and momentum "
            "still move it.",
            "Set `.grad = None` instead of zeroing it (`zero_grad(set_to_none=True)`), or leave "
            "it out of the optimizer, as `FreezeBackbone` does.",
        )
    return (
        f"{name} holds it: weight decay and momentum move what has no gradient, too.",
        "Leave frozen parameters out of the optimizer, as `FreezeBackbone` does.",
    )


def _average_with(name: str, tensor: Tensor, scene: Scene) -> Why | None:
    """A callback that averages weights is to blame if its copy has just these bytes."""
    for average in scene.averages:
        copy = average.tensors().get(name) if average.used and average.written else None
        if copy is not None and copy.shape == tensor.shape and digest(copy) == digest(tensor):
            return why_average(average.label)
    return None


def why_average(label: str) -> Why:
    """The cause and the fix where an average isn't equal to what it is the average of."""
    return (
        f"`{label}` averages weights and writes the average back, rounded.",
        "Leave the frozen parameters out of the average, or accept changes in the last bit.",
    )


def why_buffer_changed(baseline: Baseline, position: int, scene: Scene) -> Why:
    """The cause and the fix for a buffer of a frozen module that changed.

    Args:
        baseline: what it was.
        position: which tensor of the baseline.
        scene: what can be looked at.
    """
    module = baseline.owner(position)
    assert module is not None
    name = baseline.names[position]
    tensor = baseline.tensor(position)
    if tensor is None:
        return (
            "It was deleted, or set to None.",
            "Find what takes this buffer away; a batch-norm without statistics uses each batch's.",
        )
    if is_batch_norm(module):
        cause = _batch_norm(module, name, baseline, scene)
        if cause is not None:
            return cause
    if _spectral(module, name.rpartition(".")[2]):
        return (
            "Spectral norm estimates it anew in every forward pass in train mode, whatever "
            "`requires_grad` says.",
            "Put the module in eval mode, as `FreezeBackbone` does, or take spectral norm off "
            "it (`remove_parametrizations`).",
        )
    write = scene.trace.writes.get(name) if scene.trace else None
    average = _average_with(name, tensor, scene)
    if average is not None:
        return average
    if address(tensor) != baseline.address(position):
        return (
            f"Some code assigned another tensor to it{_where(write, scene)}.",
            "Find what assigns this buffer and stop it.",
        )
    return (
        f"Some code wrote to it{_where(write, scene)}.",
        f"Find what writes to this buffer and stop it{_OR_MEANT}.",
    )


def _batch_norm(module: nn.Module, name: str, baseline: Baseline, scene: Scene) -> Why | None:
    """Batch-norm counts the batches it takes in; without a count, its mode has to do."""
    path = name.rpartition(".")[0]
    inside = f"{path}." if path else ""
    counted = getattr(module, "num_batches_tracked", None)
    if counted is not None and not int(counted):
        for average in scene.averages:
            if "Stochastic" in average.label and average.written:
                return (
                    f"`{average.label}` resets the statistics of every batch-norm before its last "
                    "pass over the data, and a frozen one, in eval mode, doesn't gather new ones.",
                    "Leave batch-norm out of what you freeze (`train_bn=True`), or replace it by "
                    "one without running statistics.",
                )
    # by the baseline, not by what a slice has just shown
    counter = f"{inside}num_batches_tracked"
    took_in = module.training if counted is None else baseline.differs(counter)
    own = any(baseline.differs(f"{inside}{key}") for key, _ in module._parameters.items())
    write = scene.trace.writes.get(name) if scene.trace else None
    flip = scene.trace.modes.get(path) if scene.trace else None
    elsewhere = write is not None and (write.after, write.before) in _NO_FORWARD and flip is None
    if not took_in or own or elsewhere:
        return None  # a forward pass moves statistics, and neither weights nor in between
    if module.training:
        return (
            "Its batch-norm is in train mode, and `requires_grad=False` doesn't stop running "
            "statistics.",
            "Put it in eval mode on every epoch, as `FreezeBackbone` does, or say `train_bn=True`.",
        )
    since = "" if flip is None else when(flip.after, flip.before, scene.who)
    return (
        f"Its batch-norm took in batches: it was in train mode for a time{since}, and is in eval "
        "mode again.",
        "Find what calls `train()` on it; `FreezeBackbone` puts it back before each forward pass.",
    )


def _spectral(module: nn.Module, key: str) -> bool:
    """Whether a buffer is one of spectral norm's, of the new kind or the old."""
    if type(module).__name__ == "_SpectralNorm":
        return True
    hooks = module._forward_pre_hooks.values()
    return any(
        type(hook).__name__ == "SpectralNorm" and key.startswith(getattr(hook, "name", "-"))
        for hook in hooks
    )
