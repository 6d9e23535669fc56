"""A model and what trains in each stage -> FLOPs of a training step in each.

Counted by torch's own counter on tensors without content: a forward pass, and a backward pass that
goes as deep as the stage needs. What is frozen below everything that trains costs no backward
pass; what is frozen above something that trains still passes gradients on to its inputs. The
optimizer's own arithmetic isn't counted.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_freeze.engine.flags import can_train
from lightning_freeze.model.index import ModelIndex, peel, some
from lightning_freeze.report.cost.graph import Backward, Unpredictable
from lightning_freeze.report.cost.inputs import Call, given, guesses
from lightning_freeze.report.cost.repeats import run_alike_once
from lightning_freeze.report.cost.shadow import nothing_real, random_state, shadow, tensors_in

# much work, of which torch's counter says nothing
_UNCOUNTED = (
    "aten.mkldnn_rnn_layer",
    "aten._cudnn_rnn",
    "aten.miopen_rnn",
    "aten._trilinear",
    "aten._int_mm",
    "aten._weight_int4pack_mm",
    "aten._weight_int8pack_mm",
    "aten._scaled_grouped_mm",
    "aten._fft_r2c",
    "aten._fft_c2c",
    "aten._fft_c2r",
)
# what a loss is made of, in a model of transformers
_PREDICTED = re.compile(r"(^|_)logits$|^pred_")
# seconds that a preview may take where each stage has to be run
PATIENCE = 60.0
_GIVE = "Give `inputs=` a batch as your model's `forward` takes it: a tensor, a tuple or a mapping."


@dataclass(frozen=True)
class StepCost:
    """FLOPs of one training step.

    Attributes:
        full: of a step that trains everything; None where it couldn't be counted.
        stages: of a step in each stage; empty where it couldn't be counted.
        inputs: the inputs it was counted for, in words.
        notes: what to know about the numbers, or why there are none and what to do.
    """

    full: int | None
    stages: tuple[int, ...]
    inputs: str
    notes: tuple[str, ...] = ()


class CountError(Exception):
    """A step can't be counted; the message says why."""


class _NoModules:
    """Stands in for what tells modules apart: slow, and not needed for a total."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


class _Counter(FlopCounterMode):
    """Torch's counter, with what it leaves out: by a formula where there is one, else by name."""

    def __init__(self) -> None:
        more = {
            getattr(torch.ops.aten, name): formula
            for name, formula in _FORMULAS.items()
            if hasattr(torch.ops.aten, name)
        }
        super().__init__(display=False, custom_mapping=more)
        self.mod_tracker: Any = _NoModules()
        self.uncounted: set[str] = set()
        self.repeated = 0

    def total(self) -> int:
        """FLOPs so far."""
        return int(self.get_total_flops()) + self.repeated

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        if str(func_packet) in _UNCOUNTED:
            self.uncounted.add(str(func_packet))
        return super()._count_flops(func_packet, out, args, kwargs)  # type: ignore[no-untyped-call]


def _grouped(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
    # one side's rows or columns, or what both share, are dealt to groups; with two 3D sides none is
    return 2 * (a[0] if len(a) == len(b) == 3 else 1) * a[-2] * a[-1] * b[-1]


_FORMULAS = {
    "_grouped_mm": _grouped,
    "mv": lambda a, _, **__: 2 * a[0] * a[1],
    "addmv": lambda _, a, __, **___: 2 * a[0] * a[1],
    "dot": lambda a, _, **__: 2 * a[0],
}


def step_cost(
    model: nn.Module,
    stages: Sequence[AbstractSet[str]],
    inputs: Any = None,
    batch: int = 1,
) -> StepCost:
    """Count a training step in each stage.

    Args:
        model: any module, on the meta device too; it isn't changed.
        stages: names of what trains, for each stage.
        inputs: a batch as the model's `forward` takes it; guessed where None.
        batch: samples in a guessed batch.

    Returns:
        A `StepCost`; one without numbers where the model can't be run, with a note why.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        >>> cost = step_cost(model, [{"1.weight", "1.bias"}])
        >>> cost.full, cost.stages  # forward 64 + 32; weights 64 + 32; inputs of the second 32
        (224, (128,))
    """
    if not any(True for _ in model.parameters()):
        return StepCost(None, (), "", ("The model has no parameters: there is nothing to count.",))
    try:
        with nothing_real(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a model's own, about inputs that aren't real
            try:
                return _counted(peel(model), stages, inputs, batch)
            except CountError as error:
                # torch multiplies the experts of a mixture in this type alone, real numbers aside
                if "BF16" not in str(error):
                    raise
                return _counted(peel(model), stages, inputs, batch, torch.bfloat16)
    except CountError as error:
        return StepCost(None, (), "", (f"The cost of a step isn't known: {error}",))
    except Exception as error:  # any model of anybody's runs here
        said = f"{type(error).__name__}: {_first_line(error)}"
        note = f"The cost of a step isn't known: the model can't be copied or counted ({said})."
        return StepCost(None, (), "", (note,))


def _counted(
    model: nn.Module,
    stages: Sequence[AbstractSet[str]],
    inputs: Any,
    batch: int,
    dtype: torch.dtype | None = None,
) -> StepCost:
    copied = _copy(model, None, dtype)
    calls = [given(inputs)] if inputs is not None else list(guesses(copied, batch))
    if not calls:
        raise CountError(f"no inputs could be guessed for {type(model).__name__}. {_GIVE}")
    names = [*stages, frozenset(copied.parameters)]
    mask = {
        id(p): sum(1 << number for number, trains in enumerate(names) if name in trains)
        for name, p in copied.parameters.items()
        if can_train(p)
    }
    with _Counter() as counter:
        run_alike_once(copied.modules[""], counter)
        tried = _first_that_runs(copied, calls, counter, guessed=inputs is None)
        roots = _roots(tried.output)
        if not tried.forward:
            raise CountError(f"no FLOPs were counted for the inputs {tried.words}. {_GIVE}")
        if not roots:
            raise CountError(
                f"nothing that `forward` returns for the inputs {tried.words} depends on a "
                f"parameter that can train. {_GIVE}"
            )
        try:
            backward = Backward(roots, counter.total)
            reached = backward.leaves()
            totals = [tried.forward + part for part in backward.count(mask, len(names))]
        except (Unpredictable, AttributeError, TypeError, RuntimeError):
            # an older torch, too, which can't run one operation alone
            totals = []
            begin = time.monotonic()
            for number, trains in enumerate(names):
                _check_patience(begin, number, len(names))
                totals.append(_one_by_one(model, tried, trains, counter, dtype))
            reached = set(mask)
    if counter.uncounted:
        named = ", ".join(sorted(name.removeprefix("aten.") for name in counter.uncounted))
        raise CountError(f"torch counts no FLOPs for {named}, which the model uses.")
    unused = [name for name, p in copied.parameters.items() if id(p) in mask.keys() - reached]
    notes = []
    if unused:
        notes.append(
            f"With these inputs {len(unused)} of {len(copied.parameters)} tensors have no part in "
            f"the result, so their cost isn't counted: {some(unused)}. Give `inputs=` for another "
            "batch."
        )
    return StepCost(totals[-1], tuple(totals[:-1]), tried.words, tuple(notes))


def _check_patience(begin: float, done: int, stages: int) -> None:
    expected = (time.monotonic() - begin) / max(done, 1) * stages
    if done and expected > PATIENCE:
        raise CountError(
            "this model recomputes in its backward pass (gradient checkpointing, or a function of "
            f"its own), so each of {stages} stages has to be run: about {expected / 60:.1f} "
            "minutes. Preview fewer stages, or without gradient checkpointing."
        )


def _copy(
    model: nn.Module, names: AbstractSet[str] | None, dtype: torch.dtype | None
) -> ModelIndex:
    """A copy in which some parameters train; all that can where None."""
    chosen = None
    if names is not None:
        index = ModelIndex.of(model)
        chosen = {id(index.parameters[name]) for name in names}

    def trains(parameter: nn.Parameter) -> bool:
        return can_train(parameter) and (chosen is None or id(parameter) in chosen)

    return ModelIndex.of(shadow(model, trains, dtype))


@dataclass(frozen=True)
class _Tried:
    """A forward pass that went through."""

    call: Call
    train: bool
    output: Any
    words: str
    forward: int


def _first_that_runs(
    copied: ModelIndex, calls: Sequence[Call], counter: _Counter, *, guessed: bool
) -> _Tried:
    """Try ways to call a model, each in train mode and then in eval mode.

    In train mode a model may need more than one sample for a normalisation, or drop layers by
    chance. Where torch draws, what isn't a number yet can't decide, so it fails; others are seen.
    """
    first: Exception | None = None
    for call in calls:
        for train in (True, False):
            copied.modules[""].train(train)
            counter.uncounted.clear()
            before, drawn = counter.total(), random_state()
            try:
                output, words = call.run(copied.modules[call.path], _dtype(copied))
                if train and drawn != random_state():
                    continue
                return _Tried(call, train, output, words, counter.total() - before)
            except Exception as error:  # any model of anybody's runs here
                first = first or error
    name = type(copied.modules[""]).__name__
    said = f"{type(first).__name__}: {_first_line(first)}" if first else "it draws by chance"
    if guessed:
        raise CountError(
            f"{name} doesn't run without real numbers on guessed inputs ({said}). {_GIVE}"
        )
    raise CountError(f"{name} doesn't run without real numbers on the inputs given ({said}).")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    line = text.splitlines()[0].strip() if text else ""
    return line.rstrip(".") if len(line) < 200 else line[:197] + "..."


def _dtype(index: ModelIndex) -> torch.dtype:
    """That of the first parameter which is no whole number: half models take half inputs."""
    for parameter in index.parameters.values():
        if parameter.is_floating_point():
            return parameter.dtype
    return torch.get_default_dtype()


def _roots(output: Any) -> list[Tensor]:
    """The loss itself, what it is made of, or all that depends on a parameter."""
    if isinstance(output, Mapping):
        for names in (["loss"], [n for n in output if _PREDICTED.search(str(n))]):
            values = [output.get(name) for name in names]
            found = [v for v in values if isinstance(v, Tensor) and v.requires_grad]
            if found:
                return found
        output = {name: value for name, value in output.items() if name != "past_key_values"}
    made = {(id(t.grad_fn), t.output_nr): t for t in tensors_in(output) if t.grad_fn is not None}
    return list(made.values())


def _one_by_one(
    model: nn.Module,
    tried: _Tried,
    names: AbstractSet[str],
    counter: _Counter,
    dtype: torch.dtype | None,
) -> int:
    """A forward and a backward pass with exactly that trainable."""
    copied = _copy(model, names, dtype)
    copied.modules[""].train(tried.train)
    before = counter.total()
    output, _ = tried.call.run(copied.modules[tried.call.path], _dtype(copied))
    roots = _roots(output)
    if roots:
        torch.autograd.backward(roots, [torch.empty_like(root) for root in roots])
    return counter.total() - before
