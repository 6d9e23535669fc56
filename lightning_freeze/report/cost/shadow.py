"""A model -> a copy of it without weights, on which a step can be tried."""

from __future__ import annotations

import copy
import logging
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
# hooks that compute a weight (weight norm, pruning, adapters); others may write to what isn't ours
_LIBRARIES = ("torch.", "transformers.", "timm.", "peft.")


def shadow(
    model: nn.Module, trains: Callable[[nn.Parameter], bool], dtype: torch.dtype | None = None
) -> nn.Module:
    """Copy a model with fake tensors in place of its weights; call it inside a fake mode.

    Args:
        model: any module; it isn't changed, and no weight is read.
        trains: which of its parameters require a gradient in the copy.
        dtype: of what isn't whole numbers in the copy; as in the model where None.

    Returns:
        A copy in train mode, without hooks of the user's.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                memo[id(parameter)] = nn.Parameter(like(parameter, dtype), trains(parameter))
        for tensor in _tensors_beside(module):
            if id(tensor) not in memo:
                memo[id(tensor)] = like(tensor, dtype)
        for name in _HOOKS:
            hooks = vars(module).get(name)
            if hooks:
                memo[id(hooks)] = OrderedDict((k, h) for k, h in hooks.items() if _of_library(h))
    return copy.deepcopy(model, memo).train()


def _tensors_beside(module: nn.Module) -> Iterator[Tensor]:
    """Buffers, and what is kept as a plain attribute or in a list or a dict of them."""
    outside = ("_parameters", "_modules", *_HOOKS)
    todo: list[Any] = [value for name, value in vars(module).items() if name not in outside]
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            yield value
        elif type(value) in (list, tuple, set):
            todo += value
        elif type(value) is dict:
            todo += value.values()


def _of_library(hook: Any) -> bool:
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return str(home).startswith(_LIBRARIES)


def like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the same shape, strides and type; inside a fake mode, one without content."""
    if tensor.layout != torch.strided:
        raise TypeError(f"a tensor of the layout {tensor.layout} can't be stood in for")
    kept = tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=kept, device="cpu")


def stand_ins(content: Any) -> Any:
    """Nested inputs with each tensor replaced by one without content."""
    if isinstance(content, Tensor):
        return like(content)
    if isinstance(content, tuple) and hasattr(content, "_fields"):
        return type(content)(*(stand_ins(value) for value in content))
    if isinstance(content, (list, tuple)):
        return type(content)(stand_ins(value) for value in content)
    if isinstance(content, Mapping):
        return {key: stand_ins(value) for key, value in content.items()}
    return content


def tensors_in(content: Any) -> Iterator[Tensor]:
    """Every tensor of a nested output."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from tensors_in(value)
    elif isinstance(content, (list, tuple)):
        for value in content:
            yield from tensors_in(value)
    elif is_dataclass(content) and not isinstance(content, type):
        for field in fields(content):
            yield from tensors_in(getattr(content, field.name))


@contextmanager
def nothing_real() -> Iterator[None]:
    """Compute with shapes alone, and leave no trace: no memory, no random number drawn.

    Attention is computed by its definition. Of the fused kernels, those for the CPU aren't
    counted by torch at all, and those for a GPU differ from one GPU to another.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel

    onednn: Any = torch.backends.mkldnn
    before = onednn.enabled
    with ExitStack() as stack:
        stack.enter_context(_same_random_numbers())
        stack.enter_context(_without_traces_of_guesses())
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            # its recurrent layers aren't counted
            onednn.enabled = False
            yield
        finally:
            onednn.enabled = before


@contextmanager
def _without_traces_of_guesses() -> Iterator[None]:
    """Torch logs each operation that doesn't fit its inputs; a guess that fails isn't news."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def random_state() -> Any:
    """Of Python's and numpy's generators: another one after something was drawn."""
    numpy = sys.modules.get("numpy")
    drawn = numpy.random.get_state()[1:3] if numpy else None
    return random.getstate(), drawn and (drawn[0].tobytes(), drawn[1])


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Whatever is drawn inside is drawn again afterwards."""
    numpy = sys.modules.get("numpy")
    python = random.getstate()
    drawn = numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(drawn)
