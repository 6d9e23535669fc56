"""A model -> inputs for one training step, guessed from what the model says of itself.

Only shapes count. Guesses are tried in order; the first that the model takes is used, and named.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_freeze.model.discovery.zoo import kind_of
from lightning_freeze.model.index import ModelIndex
from lightning_freeze.report.cost.shadow import stand_ins, tensors_in

TOKENS = 128
SAMPLES = 16_000  # a second of speech


@dataclass(frozen=True)
class Spec:
    """Shape and kind of one tensor."""

    shape: tuple[int, ...]
    whole: bool = False

    def make(self, dtype: torch.dtype) -> Tensor:
        """A tensor like that; whole numbers are all 1."""
        if self.whole:
            return torch.ones(self.shape, dtype=torch.long)
        return torch.zeros(self.shape, dtype=dtype)


@dataclass(frozen=True)
class Call:
    """One way to call a model.

    Attributes:
        path: of the module to call.
        arguments: by position: a `Spec`, or anything as it is.
        options: by name.
    """

    path: str = ""
    arguments: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def run(self, module: nn.Module, dtype: torch.dtype) -> tuple[Any, str]:
        """Call the module with tensors that have no content.

        Returns:
            What it returns, and the inputs in words.
        """
        arguments = [_made(value, dtype) for value in self.arguments]
        options = {name: _made(value, dtype) for name, value in self.options.items()}
        shapes = [_words("", value) for value in arguments]
        shapes += [_words(name, value) for name, value in options.items()]
        return module(*arguments, **options), ", ".join(filter(None, shapes))


def _made(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Spec):
        return value.make(dtype)
    if isinstance(value, list):
        return [_made(item, dtype) for item in value]
    return stand_ins(value)


def _words(name: str, value: Any) -> str:
    shapes = ["x".join(map(str, tensor.shape)) or "scalar" for tensor in tensors_in(value)]
    return f"{name} {' + '.join(shapes)}".strip() if shapes else ""


def given(inputs: Any) -> Call:
    """What a user gave: a mapping by name, a tuple or a list by position, else one argument."""
    if isinstance(inputs, Mapping):
        return Call(options=dict(inputs))
    if isinstance(inputs, (tuple, list)):
        return Call(arguments=tuple(inputs))
    return Call(arguments=(inputs,))


def guesses(index: ModelIndex, batch: int) -> Iterator[Call]:
    """Ways to call a model, the best first."""
    example = getattr(index.modules[""], "example_input_array", None)
    if example is not None:
        yield given(example)
    callers = [path for path in index.roots if _has_forward(index.modules[path])]
    for path in index.roots:
        module = index.modules[path]
        kind = kind_of(module)
        if kind is None:
            continue
        for call in _of_library(module, kind, batch):
            for outer in callers[: callers.index(path) + 1 if path in callers else None]:
                yield Call(outer, call.arguments, call.options)
        return
    if callers:
        for call in _of_parts(index, callers[0], batch):
            yield Call(callers[0], call.arguments, call.options)


def _has_forward(module: nn.Module) -> bool:
    """Whether somebody wrote a forward pass: a LightningModule needs none, nor does a list."""
    home = getattr(type(module).forward, "__module__", "")
    unwritten = home.startswith(("lightning", "pytorch_lightning", "torch.nn.modules.module"))
    return not unwritten and not isinstance(module, (nn.ModuleList, nn.ModuleDict))


def _of_library(module: Any, kind: str, batch: int) -> Iterator[Call]:
    if kind == "transformers":
        yield from _transformers(module, batch)
        return
    sizes: list[Any] = []
    if kind == "timm":
        patches = getattr(module, "patch_embed", None)
        sizes.append(getattr(patches, "img_size", None))
        sizes.append((_settings(module).get("input_size") or (None,) * 3)[1:])
    large = type(module).__name__ == "Inception3"  # its auxiliary classifier needs more pixels
    sizes += [getattr(module, "image_size", None), 299 if large else 224, 299]
    channels, dimensions = _first_convolution(module)
    for size in dict.fromkeys(_pair(size) for size in sizes if _is_size(size)):
        if dimensions == 3:  # video
            yield Call(arguments=(Spec((batch, channels, 16, *size)),))
        else:
            yield Call(arguments=(Spec((batch, channels, *size)),))


def _settings(module: Any) -> Mapping[str, Any]:
    for name in ("pretrained_cfg", "default_cfg"):
        found = getattr(module, name, None)
        if isinstance(found, Mapping) and found:
            return found
    return {}


def _is_size(size: Any) -> bool:
    if isinstance(size, (tuple, list)):
        return len(size) == 2 and all(isinstance(item, int) for item in size)
    return isinstance(size, int) and not isinstance(size, bool)


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    return tuple(size)


def _first_convolution(module: nn.Module) -> tuple[int, int]:
    """Channels that it takes, and its dimensions."""
    for part in module.modules():
        for dimensions, kind in ((2, nn.Conv2d), (3, nn.Conv3d)):
            if isinstance(part, kind):
                return part.in_channels, dimensions
    return 3, 2


_PARTS = ("text_config", "vision_config", "audio_config", "encoder", "decoder", "backbone_config")


def _setting(config: Any, *names: str, default: Any = None) -> Any:
    """The first of some settings that a config has, or the config of one of its parts."""
    parts = [config, *(getattr(config, part, None) for part in _PARTS)]
    for name in names:
        for part in parts:
            value = part.get(name) if isinstance(part, dict) else getattr(part, name, None)
            if value is not None:
                return value
    return default


def _transformers(model: Any, batch: int) -> Iterator[Call]:
    config = model.config
    takes = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    length = _setting(config, "max_position_embeddings", "n_positions")
    if length is None and main == "input_ids":
        length = _setting(config, "max_source_positions")
    tokens = TOKENS
    if isinstance(length, int) and 0 < length < 4 * TOKENS:
        tokens = max(1, min(TOKENS, length - 4))  # RoBERTa's positions begin after its padding
    ids = Spec((batch, tokens), whole=True)
    makers: dict[str, Any] = {
        "input_ids": lambda: ids,
        "pixel_values": lambda: _pixels(config, batch),
        "input_values": lambda: _waveform(config, batch),
        "input_features": lambda: _features(config, batch),
        "audio_values": lambda: _waveform(config, batch),
        "pixel_values_videos": lambda: _video(config, batch),
    }
    fixed: dict[str, Any] = {}
    if "use_cache" in takes:
        fixed["use_cache"] = False
    if "decoder_input_ids" in takes and _setting(config, "is_encoder_decoder"):
        most = _setting(config, "max_target_positions", default=tokens)
        fixed["decoder_input_ids"] = Spec((batch, min(tokens, most)), whole=True)
    both = [n for n in ("input_ids", "pixel_values", "input_features") if n in takes]
    several = hasattr(config, "text_config") and len(both) > 1
    if several:
        yield Call(options={**{name: makers[name]() for name in both}, **fixed})
    if main in makers and main in takes:
        yield Call(options={main: makers[main](), **fixed})
    if isinstance(dummy := getattr(model, "dummy_inputs", None), Mapping):
        known = {name: value for name, value in dummy.items() if name in takes}
        yield Call(options={**fixed, **known})
    for name, make in makers.items():
        if name in takes and name != main:
            yield Call(options={name: make(), **fixed})


def _pixels(config: Any, batch: int) -> Spec:
    size = _setting(config, "image_size", "input_size", default=224)
    channels = _setting(config, "num_channels", "in_channels", "in_chans", default=3)
    side = _pair(size) if _is_size(size) else (224, 224)
    frames = getattr(config, "num_frames", None)
    if isinstance(frames, int):
        return Spec((batch, frames, channels, *side))
    return Spec((batch, channels, *side))


def _video(config: Any, batch: int) -> Spec:
    image = _pixels(config, batch).shape
    frames = _setting(config, "num_frames", "frames_per_clip", default=16)
    return Spec((batch, frames, *image[-3:]))


def _waveform(config: Any, batch: int) -> Spec:
    bins = getattr(config, "num_mel_bins", None)
    if isinstance(bins, int) and isinstance(getattr(config, "max_length", None), int):
        return Spec((batch, config.max_length, bins))  # a spectrogram
    channels = getattr(config, "audio_channels", None)
    return Spec((batch, channels, SAMPLES) if isinstance(channels, int) else (batch, SAMPLES))


def _features(config: Any, batch: int) -> Spec:
    bins = _setting(config, "num_mel_bins", default=80)
    positions = _setting(config, "max_source_positions")
    width = _setting(config, "feature_projection_input_dim", "input_feat_per_channel")
    if isinstance(width, int):
        return Spec((batch, TOKENS, width))
    return Spec((batch, bins, 2 * positions if isinstance(positions, int) else 3000))


def _of_parts(index: ModelIndex, root: str, batch: int) -> Iterator[Call]:
    """A model of which nothing is known but its layers: those of its first one fit."""
    outer = index.modules[root]
    if not isinstance(outer, nn.Sequential) and len(_required(outer)) != 1:
        return
    for path, module in index.modules.items():
        if path != root and root and not path.startswith(root + "."):
            continue
        if isinstance(module, nn.Linear):
            yield Call(arguments=(Spec((batch, module.in_features)),))
        elif isinstance(module, nn.Conv2d):
            yield Call(arguments=(Spec((batch, module.in_channels, 224, 224)),))
        elif isinstance(module, nn.Conv3d):
            yield Call(arguments=(Spec((batch, module.in_channels, 16, 112, 112)),))
        elif isinstance(module, nn.Embedding):
            yield Call(arguments=(Spec((batch, TOKENS), whole=True),))
        elif not any(True for _ in module.parameters()) or any(True for _ in module.children()):
            continue
        return


def _required(module: nn.Module) -> list[str]:
    """Arguments that its forward pass can't do without."""
    try:
        takes = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in takes if p.default is p.empty and p.kind not in free]
