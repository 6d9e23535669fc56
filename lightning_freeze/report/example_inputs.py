"""A model -> inputs for one training step, guessed from what the model says of itself.

Only shapes count. Guesses are tried in order; the first that the model takes is used, and named.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_freeze.model.discovery.zoo import kind_of
from lightning_freeze.model.index import ModelIndex

TOKENS = 128
SAMPLES = 16_000  # a second of speech


@dataclass(frozen=True)
class Call:
    """One way to call a model.

    Attributes:
        path: of the module to call.
        arguments: by position.
        options: by name.
        dtype: of the tensors that aren't whole numbers; as they are where None.
    """

    path: str = ""
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype | None = None

    def run(self, index: ModelIndex) -> tuple[Any, str]:
        """Call the module with tensors without content; what it returns, and they in words."""
        arguments, options = tree_map_only(
            Tensor, lambda tensor: like(tensor, self.dtype), (self.arguments, self.options)
        )
        words = [_words("", value) for value in arguments]
        words += [_words(name, value) for name, value in options.items()]
        return index.modules[self.path](*arguments, **options), ", ".join(filter(None, words))


def _words(name: str, value: Any) -> str:
    shapes = ["x".join(map(str, tensor.shape)) or "scalar" for tensor in tensors_in(value)]
    return f"{name} {' + '.join(shapes)}".strip() if shapes else ""


def like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the same shape, strides and type; inside a fake mode, one without content."""
    if tensor.layout != torch.strided:
        raise TypeError(f"a tensor of the layout {tensor.layout} can't be stood in for")
    kept = tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=kept, device="cpu")


def tensors_in(content: Any) -> Iterator[Tensor]:
    """Every tensor of nested inputs, or of an output."""
    for leaf in tree_leaves(content):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from tensors_in(dict(leaf))
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            yield from tensors_in([getattr(leaf, part.name) for part in fields(leaf)])


def given(inputs: Any) -> Call:
    """What a user gave: a mapping by name, a tuple or a list by position, else one argument."""
    if isinstance(inputs, Mapping):
        return Call(options=dict(inputs))
    return Call(arguments=tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,))


def guesses(index: ModelIndex, batch: int, dtype: torch.dtype | None = None) -> Iterator[Call]:
    """Ways to call a model, the best first.

    Args:
        index: of the model.
        batch: samples.
        dtype: of the model: one in half precision takes half inputs.
    """
    example = getattr(index.modules[""], "example_input_array", None)
    if example is not None:
        yield given(example)
    callers = [path for path in index.roots if _has_forward(index.modules[path])]
    for path in index.roots:
        module: Any = index.modules[path]
        kind = kind_of(module)
        if kind is not None:
            made = _transformers if kind == "transformers" else _images
            for call in made(module, batch):
                for outer in callers[: callers.index(path) + 1 if path in callers else None]:
                    yield replace(call, path=outer, dtype=dtype)
            return
    first = _first_layer(index, callers[0], batch) if callers else None
    if first is not None:
        yield Call(callers[0], (first,), dtype=dtype)


def _has_forward(module: nn.Module) -> bool:
    """Whether somebody wrote a forward pass: a LightningModule needs none, nor does a list."""
    home = getattr(type(module).forward, "__module__", "")
    unwritten = home.startswith(("lightning", "pytorch_lightning", "torch.nn.modules.module"))
    return not unwritten and not isinstance(module, (nn.ModuleList, nn.ModuleDict))


def _ids(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.long)


def _pair(size: Any) -> tuple[int, int] | None:
    """Height and width, if that is what it is."""
    if isinstance(size, int) and not isinstance(size, bool):
        return size, size
    pair = isinstance(size, (tuple, list)) and len(size) == 2
    return (size[0], size[1]) if pair and all(isinstance(one, int) for one in size) else None


def _images(module: Any, batch: int) -> Iterator[Call]:
    """For models of timm, torchvision, and such as are built like them."""
    settings = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
    said = settings.get("input_size") if isinstance(settings, Mapping) else None
    large = type(module).__name__ == "Inception3"  # its auxiliary classifier needs more pixels
    sizes = [
        getattr(getattr(module, "patch_embed", None), "img_size", None),
        said and said[1:],
        getattr(module, "image_size", None),
        299 if large else 224,
        299,
    ]
    first = next((m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), None)
    channels = 3 if first is None else first.in_channels
    frames = (16,) if isinstance(first, nn.Conv3d) else ()
    for size in dict.fromkeys(filter(None, map(_pair, sizes))):
        yield Call(arguments=(torch.zeros(batch, channels, *frames, *size),))


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
    fixed: dict[str, Any] = {}
    if "use_cache" in takes:
        fixed["use_cache"] = False
    if "decoder_input_ids" in takes and _setting(config, "is_encoder_decoder"):
        most = _setting(config, "max_target_positions", default=tokens)
        fixed["decoder_input_ids"] = _ids(batch, min(tokens, most))
    makers: dict[str, Callable[[], tuple[int, ...]]] = {
        "input_ids": lambda: (tokens,),
        "pixel_values": lambda: _pixels(config),
        "input_values": lambda: _waveform(config),
        "input_features": lambda: _features(config),
        "audio_values": lambda: _waveform(config),
        "pixel_values_videos": lambda: _video(config),
    }

    def made(name: str) -> Tensor:
        shape = (batch, *makers[name]())
        return _ids(*shape) if name == "input_ids" else torch.zeros(shape)

    both = [n for n in ("input_ids", "pixel_values", "input_features") if n in takes]
    if hasattr(config, "text_config") and len(both) > 1:
        yield Call(options={**{name: made(name) for name in both}, **fixed})
    if main in makers and main in takes:
        yield Call(options={main: made(main), **fixed})
    if isinstance(dummy := getattr(model, "dummy_inputs", None), Mapping):
        yield Call(options={**fixed, **{n: value for n, value in dummy.items() if n in takes}})
    for name in makers:
        if name in takes and name != main:
            yield Call(options={name: made(name), **fixed})


def _pixels(config: Any) -> tuple[int, ...]:
    size = _pair(_setting(config, "image_size", "input_size")) or (224, 224)
    channels = _setting(config, "num_channels", "in_channels", "in_chans", default=3)
    frames = getattr(config, "num_frames", None)
    return (*((frames,) if isinstance(frames, int) else ()), channels, *size)


def _video(config: Any) -> tuple[int, ...]:
    frames = _setting(config, "num_frames", "frames_per_clip", default=16)
    return (frames, *_pixels(config)[-3:])


def _waveform(config: Any) -> tuple[int, ...]:
    bins, length = getattr(config, "num_mel_bins", None), getattr(config, "max_length", None)
    if isinstance(bins, int) and isinstance(length, int):
        return length, bins  # a spectrogram
    channels = getattr(config, "audio_channels", None)
    return (channels, SAMPLES) if isinstance(channels, int) else (SAMPLES,)


def _features(config: Any) -> tuple[int, ...]:
    width = _setting(config, "feature_projection_input_dim", "input_feat_per_channel")
    if isinstance(width, int):
        return TOKENS, width
    positions = _setting(config, "max_source_positions")
    bins = _setting(config, "num_mel_bins", default=80)
    return bins, 2 * positions if isinstance(positions, int) else 3000


def _first_layer(index: ModelIndex, root: str, batch: int) -> Tensor | None:
    """What fits the first layer of a model of which nothing else is known."""
    outer = index.modules[root]
    if not isinstance(outer, nn.Sequential) and _required(outer) != 1:
        return None
    for path, module in index.modules.items():
        if path != root and root and not path.startswith(root + "."):
            continue
        if isinstance(module, nn.Linear):
            return torch.zeros(batch, module.in_features)
        if isinstance(module, nn.Conv2d):
            return torch.zeros(batch, module.in_channels, 224, 224)
        if isinstance(module, nn.Conv3d):
            return torch.zeros(batch, module.in_channels, 16, 112, 112)
        if isinstance(module, nn.Embedding):
            return _ids(batch, TOKENS)
        if any(True for _ in module.parameters()) and not any(True for _ in module.children()):
            return None
    return None


def _required(module: nn.Module) -> int:
    """How many arguments its forward pass can't do without."""
    try:
        takes = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return 0
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return sum(p.default is p.empty and p.kind not in free for p in takes)
