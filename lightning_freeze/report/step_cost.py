"""A model and what trains in each stage -> FLOPs of a training step in each.

A copy without weights runs once, forward, on tensors without content. Each operation knows in which
stages its inputs need a gradient: a parameter in those in which it trains, a result in those in
which an input does. So the cost of each stage's backward pass follows from that one pass. What is
frozen below everything that trains costs no backward pass; what is frozen above something that
trains still passes gradients on. The optimizer's own arithmetic isn't counted.
"""

from __future__ import annotations

import copy
import logging
import random
import re
import sys
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lightning_freeze.engine.flags import can_train
from lightning_freeze.model.index import ModelIndex, peel, some
from lightning_freeze.report.example_inputs import Call, given, guesses, like, tensors_in

# what a loss is made of, in a model of transformers
_PREDICTED = re.compile(r"(^|_)logits$|^pred_")
# a model that recomputes is run once for each stage: so many operations take about a minute
MOST_OPERATIONS = 100_000
_GIVE = "Give `inputs=` a batch as your model's `forward` takes it: a tensor, a tuple or a mapping."
# hooks that compute a weight (weight norm, pruning, adapters); others may write to what isn't ours
_LIBRARIES = ("torch.", "transformers.", "timm.", "peft.")


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
        with nothing_real():
            try:
                return _counted(peel(model), stages, inputs, batch)
            except CountError as error:
                # torch multiplies the experts of a mixture in this type alone, real numbers aside
                if "BF16" not in str(error):
                    raise
                return _counted(peel(model), stages, inputs, batch, torch.bfloat16)
    except CountError as error:
        note = f"The cost of a step isn't known: {error}"
    except Exception as error:  # any model of anybody's runs here
        said = _said(error)
        note = f"The cost of a step isn't known: the model can't be copied or counted ({said})."
    return StepCost(None, (), "", (note,))


def _counted(
    model: nn.Module,
    stages: Sequence[AbstractSet[str]],
    inputs: Any,
    batch: int,
    dtype: torch.dtype | None = None,
) -> StepCost:
    copied = ModelIndex.of(_without_weights(model, None, dtype))
    floats = next((p.dtype for p in copied.parameters.values() if p.is_floating_point()), None)
    calls = [given(inputs)] if inputs is not None else list(guesses(copied, batch, floats))
    if not calls:
        raise CountError(f"no inputs could be guessed for {type(model).__name__}. {_GIVE}")
    parameters = {name: p for name, p in copied.parameters.items() if can_train(p)}
    trained = [*stages, frozenset(parameters)]
    needed = {
        id(p): sum(1 << stage for stage, names in enumerate(trained) if name in names)
        for name, p in parameters.items()
    }
    tape, call, output, words = _first_that_runs(copied, calls, needed, guessed=inputs is None)
    training, roots = copied.modules[""].training, _roots(output)
    if not tape.flops:
        raise CountError(f"no FLOPs were counted for the inputs {words}. {_GIVE}")
    if not roots:
        raise CountError(
            f"nothing that `forward` returns for the inputs {words} depends on a "
            f"parameter that can train. {_GIVE}"
        )
    totals = [tape.flops + backward for backward in tape.backward(roots, len(trained))]
    operations = tape.operations
    full = _run_backward(tape, roots)
    if full != totals[-1]:
        # something is recomputed (a checkpoint), or has a backward pass of its own
        if operations * len(trained) > MOST_OPERATIONS:
            raise CountError(
                "this model recomputes in its backward pass (gradient checkpointing, or a function "
                f"of its own), so each of {len(trained)} stages would have to be run. Preview "
                "fewer stages, or without gradient checkpointing."
            )
        totals = [_run_stage(model, call, training, names, dtype) for names in trained]
    if tape.uncounted:
        named = ", ".join(sorted(name.removeprefix("aten.") for name in tape.uncounted))
        raise CountError(f"torch counts no FLOPs for {named}, which the model uses.")
    notes = []
    unused = [name for name, parameter in parameters.items() if parameter.grad is None]
    if unused:
        notes.append(
            f"With these inputs {len(unused)} of {len(copied.parameters)} tensors have no part in "
            f"the result, so their cost isn't counted: {some(unused)}. Give `inputs=` for another "
            "batch."
        )
    return StepCost(totals[-1], tuple(totals[:-1]), words, tuple(notes))


def _first_that_runs(
    copied: ModelIndex, calls: Sequence[Call], needed: Mapping[int, int], *, guessed: bool
) -> tuple[_Tape, Call, Any, str]:
    """Try ways to call a model, each in train mode and then in eval mode.

    In train mode a model may need more than one sample for a normalisation, or drop layers by
    chance. Where torch draws, what isn't a number yet can't decide, so it fails; others are seen.
    """
    first = "it draws by chance"
    for call in calls:
        for training in (True, False):
            copied.modules[""].train(training)
            drawn = _random_state()
            try:
                with _Tape(needed) as tape:
                    output, words = call.run(copied)
            except Exception as error:  # any model of anybody's runs here
                first = _said(error) if first == "it draws by chance" else first
                continue
            if not training or drawn == _random_state():
                return tape, call, output, words
    name = type(copied.modules[""]).__name__
    if guessed:
        raise CountError(
            f"{name} doesn't run without real numbers on guessed inputs ({first}). {_GIVE}"
        )
    raise CountError(f"{name} doesn't run without real numbers on the inputs given ({first}).")


def _said(error: BaseException) -> str:
    line = str(error).strip().partition("\n")[0].strip()
    line = line.rstrip(".") if len(line) < 200 else line[:197] + "..."
    return f"{type(error).__name__}: {line}"


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


def _run_backward(tape: _Tape, roots: Sequence[Tensor]) -> int:
    """FLOPs of the tape's forward pass and of a backward pass from its roots."""
    with tape:
        torch.autograd.backward(roots, [torch.empty_like(root) for root in roots])
    return tape.flops


def _run_stage(
    model: nn.Module,
    call: Call,
    training: bool,
    names: AbstractSet[str],
    dtype: torch.dtype | None,
) -> int:
    """FLOPs of a forward and a backward pass with exactly that trainable."""
    copied = ModelIndex.of(_without_weights(model, names, dtype))
    copied.modules[""].train(training)
    with _Tape({}) as tape:
        output, _ = call.run(copied)
    roots = _roots(output)
    return _run_backward(tape, roots) if roots else tape.flops


# ---------------------------------------------------------------- what an operation costs

# where the factors of a product stand whose gradients cost as much as the product
_FACTORS = {
    "aten.mm": (0, 1),
    "aten.bmm": (0, 1),
    "aten._grouped_mm": (0, 1),
    "aten.addmm": (1, 2),
    "aten.baddbmm": (1, 2),
    "aten.mv": (1,),  # the gradient of the matrix is an outer product
    "aten.addmv": (2,),
}
# much work, of which torch's formulas say nothing
_UNCOUNTED = frozenset(
    f"aten.{name}"
    for name in (
        "mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn", "_trilinear", "_int_mm",
        "_weight_int4pack_mm", "_weight_int8pack_mm", "_scaled_grouped_mm",
        "_fft_r2c", "_fft_c2c", "_fft_c2r",
    )
)  # fmt: skip


def _grouped(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    # one side's rows or columns, or what both share, are dealt to groups; with two 3D sides none is
    each = 2 * a.shape[-2] * a.shape[-1] * b.shape[-1]
    return each * (a.shape[0] if a.dim() == b.dim() == 3 else 1)


# what torch leaves out
_FORMULAS = {
    "aten._grouped_mm": _grouped,
    "aten.mv": lambda a, _, **__: 2 * a.numel(),
    "aten.addmv": lambda _, a, *__, **___: 2 * a.numel(),
    "aten.dot": lambda a, _, **__: 2 * a.numel(),
}


def _gradients(
    name: str, flops: int, args: Sequence[Any], out: Any
) -> Iterator[tuple[Tensor, int]]:
    """What the gradient of each input costs; nothing for those that need no product."""
    if name in _FACTORS:
        for place in _FACTORS[name]:
            yield args[place], flops
    elif name == "aten.convolution":
        formula = flop_registry[torch.ops.aten.convolution_backward]
        for place in (0, 1):
            asked = [place == 0, place == 1, False]
            given = (out, *args[:2], None, *args[3:], asked)
            yield args[place], formula(*given, out_val=(args[0], args[1], None))


class _Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations, and keeps what the backward pass of each would cost, and when.

    "When" is the set of stages in which a tensor needs a gradient, as the bits of a number.

    Args:
        needed: id of a parameter -> the stages in which it trains.

    Attributes:
        flops: of all operations so far.
        operations: how many there were.
        uncounted: names of those whose FLOPs nobody knows.
    """

    def __init__(self, needed: Mapping[int, int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = self.operations = 0
        self.uncounted: set[str] = set()
        self._needed = dict(needed)
        # ids of what each operation made and of its inputs, and (stages, FLOPs) of its gradients
        self._entries: list[tuple[list[int], list[int], list[tuple[int, int]]]] = []
        self._kept: list[Any] = []  # or their ids would be given to others

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "_overloadpacket", None)
        if packet is torch.ops.prim.device:  # fake tensors ask for it all the time
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled():  # nobody else has taken it apart
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        self.operations += 1
        name = str(packet)
        if name in _UNCOUNTED:
            self.uncounted.add(name)
        formula = flop_registry.get(packet, _FORMULAS.get(name))
        flops = 0 if formula is None else formula(*args, **kwargs, out_val=out)
        self.flops += flops
        if torch.is_grad_enabled() and name != "aten.detach":
            costs = _gradients(name, flops, args, out) if flops else ()
            self._note(args, kwargs, out, [(self._needed.get(id(t), 0), n) for t, n in costs])
        return out

    def _note(self, args: Any, kwargs: Any, out: Any, costs: list[tuple[int, int]]) -> None:
        inputs = [id(x) for x in tree_leaves((args, kwargs)) if id(x) in self._needed]
        tensors = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        made = [x for x in tensors if x.is_floating_point() or x.is_complex()]
        if inputs and made:
            stages = 0
            for one in inputs:
                stages |= self._needed[one]
            self._needed.update((id(x), stages) for x in made)
            self._entries.append(([id(x) for x in made], inputs, costs))
            self._kept += made

    def backward(self, roots: Sequence[Tensor], stages: int) -> list[int]:
        """FLOPs of a backward pass in each stage, by what was noted so far."""
        reached = set(map(id, roots))
        totals: Counter[int] = Counter()
        for made, inputs, costs in reversed(self._entries):
            if not reached.isdisjoint(made):
                reached.update(inputs)
                for needed, flops in costs:
                    totals[needed] += flops
        return [
            sum(flops for needed, flops in totals.items() if needed >> stage & 1)
            for stage in range(stages)
        ]


# ---------------------------------------------------------------- a copy, and a place to run it


class _LikeCopies(TorchFunctionMode):
    """Tensors beside the parameters are copied without content, wherever a module keeps them."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        return memo.setdefault(id(tensor), like(tensor, self.dtype))


def _without_weights(
    model: nn.Module, names: AbstractSet[str] | None, dtype: torch.dtype | None
) -> nn.Module:
    """Copy a model with fake tensors in place of its weights, and without the user's hooks.

    Args:
        model: any module; it isn't changed, and no weight is read.
        names: of the parameters that train in the copy; all that can where None.
        dtype: of what isn't whole numbers in the copy; as in the model where None.
    """
    memo: dict[int, Any] = {}
    for name, parameter in ModelIndex.of(model).parameters.items():
        trains = can_train(parameter) and (names is None or name in names)
        memo[id(parameter)] = nn.Parameter(like(parameter, dtype), trains)
    for module in model.modules():
        for name, hooks in vars(module).items():
            if isinstance(hooks, OrderedDict) and name.endswith("_hooks"):
                memo[id(hooks)] = OrderedDict((k, h) for k, h in hooks.items() if _of_library(h))
    with _LikeCopies(dtype):
        return copy.deepcopy(model, memo)


def _of_library(hook: Any) -> bool:
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return str(home).startswith(_LIBRARIES)


@contextmanager
def nothing_real() -> Iterator[None]:
    """Compute with shapes alone, and leave no trace: no memory, no random number drawn.

    Attention is computed by its definition. Of the fused kernels, those for the CPU aren't
    counted by torch at all, and those for a GPU differ from one GPU to another.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel

    onednn: Any = torch.backends.mkldnn
    # torch logs each operation that doesn't fit its inputs; a guess that fails isn't news
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.callback(random.setstate, random.getstate())
        if numpy := sys.modules.get("numpy"):
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        stack.callback(setattr, logger, "disabled", logger.disabled)
        stack.callback(setattr, onednn, "enabled", onednn.enabled)
        warnings.simplefilter("ignore")  # a model's own, about inputs that aren't real
        logger.disabled = True
        onednn.enabled = False  # its recurrent layers aren't counted
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _random_state() -> Any:
    """Of Python's and numpy's generators: another one after something was drawn."""
    numpy = sys.modules.get("numpy")
    drawn = numpy.random.get_state()[1:3] if numpy else None
    return random.getstate(), drawn and (drawn[0].tobytes(), drawn[1])
