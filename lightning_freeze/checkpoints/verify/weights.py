"""A file or folder of weights -> names, dtypes and shapes, and one tensor at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Union

import torch
from torch import Tensor

from lightning_freeze.checkpoints.verify import pickles
from lightning_freeze.checkpoints.verify.content import tensors_of
from lightning_freeze.checkpoints.verify.formats import SAFETENSORS, exists, readable, regular
from lightning_freeze.checkpoints.verify.spelling import printable, tidy
from lightning_freeze.errors import VerifyError
from lightning_freeze.model.index import some

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_SUFFIXES = (".ckpt", ".safetensors", ".pt", ".pth", ".bin")
_PLAIN = re.compile(r"[^./\\][^/\\]*")
_NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "optimizer.bin")


@dataclass(frozen=True)
class Spec:
    """What is known of a tensor before it is read: dtype, such as "float32", and shape."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {'x'.join(map(str, self.shape)) or 'scalar'}"


@dataclass(frozen=True)
class Weights:
    """Tensors in a file or folder, by name. Build it with `open_weights`.

    Attributes:
        path: as it was given.
        kind: what it is, in words.
        specs: name -> dtype and shape; the components that wrappers put into names are left out.
        in_model_order: whether the names stand as the model registers them.
        tied: name -> an earlier name of the same tensor, where the file tells.
    """

    path: str
    kind: str
    specs: Mapping[str, Spec]
    in_model_order: bool
    tied: Mapping[str, str]
    _read: Mapping[str, Callable[[], Tensor]] = field(repr=False)

    def load(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            VerifyError: it isn't dense, or its bytes can't be read.
        """
        try:
            tensor = self._read[name]().detach()
        except Exception as error:
            raise VerifyError(f"`{name}` in `{self.path}` can't be read: {error}") from error
        if what := _odd(tensor):
            raise VerifyError(
                f"`{name}` in `{self.path}` {what}; only dense tensors can be compared."
            )
        return tensor


@dataclass
class _Part:
    """What one file holds."""

    kind: str
    specs: dict[str, Spec]
    read: dict[str, Callable[[], Tensor]]
    in_model_order: bool = False
    tied: dict[str, str] = field(default_factory=dict)


def open_weights(path: Union[str, Path]) -> Weights:
    """Open weights for reading. No code in a file is run, and no tensor is copied.

    Args:
        path: a Lightning checkpoint, a state dict that `torch.save` wrote, a safetensors file, or
            a folder that `save_pretrained` wrote or that holds exactly one of these files.

    Raises:
        VerifyError: there is nothing of the kind, or it is refused or damaged.
    """
    target = Path(path)
    exists(target)
    part = _folder(target) if target.is_dir() else _file(regular(target))
    if not part.specs:
        raise VerifyError(f"`{path}` holds no tensors ({part.kind}). Name a file with weights.")
    return _weights(str(path), part)


def weights_in(content: Any, name: str = "the state dict") -> Weights:
    """The same for weights that are in memory already: a state dict, or what holds one.

    Args:
        content: name -> tensor, or a checkpoint's content.
        name: what messages call it.

    Raises:
        VerifyError: there are no tensors by name.
    """
    kind, tensors = tensors_of(content, Path(name))
    return _weights(name, _part_of(kind, tensors))


def _weights(path: str, part: _Part) -> Weights:
    short = tidy(part.specs)
    return Weights(
        path=path,
        kind=part.kind,
        specs={short[name]: spec for name, spec in part.specs.items()},
        in_model_order=part.in_model_order,
        tied={short[name]: short[first] for name, first in part.tied.items()},
        _read={short[name]: read for name, read in part.read.items()},
    )


def _file(path: Path) -> _Part:
    return _safetensors(path) if readable(path) == SAFETENSORS else _torch(path)


def _safetensors(path: Path) -> _Part:
    from safetensors import SafetensorError, safe_open

    try:
        file: Any = safe_open(str(path), framework="pt", device="cpu")
        specs = {}
        for name in file.keys():  # noqa: SIM118 - it isn't a dict
            entry = file.get_slice(name)
            dtype = entry.get_dtype()
            specs[name] = _stored(dtype, tuple(entry.get_shape()))
    except (SafetensorError, OSError) as error:
        raise VerifyError(
            f"`{path}` is no whole safetensors file: it is cut off or damaged ({error}). Get it "
            "again."
        ) from None

    return _Part("safetensors", specs, {name: partial(file.get_tensor, name) for name in specs})


def _stored(dtype: str, shape: tuple[int, ...]) -> Spec:
    """What a tensor of a safetensors file becomes; torch counts numbers of four bits in pairs."""
    if dtype == "F4" and shape:
        return Spec("float4_e2m1fn_x2", (*shape[:-1], shape[-1] // 2))
    return Spec(_DTYPES.get(dtype, dtype.lower()), shape)


def _torch(path: Path) -> _Part:
    kind, tensors = tensors_of(pickles.load(path), path)
    return _part_of(kind, tensors)


def _part_of(kind: str, tensors: Mapping[str, Tensor]) -> _Part:
    specs: dict[str, Spec] = {}
    tied: dict[str, str] = {}
    seen: dict[object, str] = {}
    read: dict[str, Callable[[], Tensor]] = {}
    for name, tensor in tensors.items():
        # a nested tensor has no shape to ask for
        shape = () if tensor.is_nested else tuple(tensor.shape)
        specs[name] = Spec(str(tensor.dtype).removeprefix("torch."), shape)
        read[name] = partial(_itself, tensor)
        if not _odd(tensor) and tensor.numel():
            first = seen.setdefault((tensor.data_ptr(), specs[name], tensor.stride()), name)
            if first != name:
                tied[name] = first
    return _Part(kind, specs, read, in_model_order=True, tied=tied)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _odd(tensor: Tensor) -> str:
    """Why a tensor can't be compared byte by byte, or ""."""
    if tensor.device.type == "meta":
        return "has no bytes (meta device)"
    if tensor.is_nested:
        return "is nested"
    if tensor.is_quantized:
        return "is quantized"
    return "" if tensor.layout == torch.strided else f"has the layout {tensor.layout}"


def _folder(path: Path) -> _Part:
    if (path / ".metadata").exists():
        raise VerifyError(
            f"`{path}` is a folder of torch.distributed.checkpoint. Its `.metadata` is a pickle "
            "that may run code, so it was refused; nothing of it was executed. If you trust where "
            "it comes from, make one file of it: `python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {path} weights.pt`."
        )
    for name in _WHOLE:
        if (path / name).exists():
            part = _file(regular(path / name))
            part.kind = f"folder with {name}"
            return part
        if (path / f"{name}.index.json").exists():
            return _shards(path, f"{name}.index.json")
    files = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES and _may_be_weights(p))
    if len(files) == 1:
        part = _file(regular(files[0]))
        part.kind = f"folder with {files[0].name}"
        return part
    if files:
        listed = some([f"`{file}`" for file in files], most=8)
        raise VerifyError(f"`{path}` holds {len(files)} files of weights. Name one: {listed}.")
    there = some(sorted(f"`{p.name}`" for p in path.iterdir()), most=8) or "nothing"
    raise VerifyError(
        f"`{path}` is a folder without weights. Looked for {', '.join(_WHOLE)}, their "
        f".index.json, and one file with {', '.join(_SUFFIXES)}; there is {there}."
    )


def _may_be_weights(path: Path) -> bool:
    return path.name not in _NO_WEIGHTS and not path.name.startswith(("rng_state", "."))


def _shards(folder: Path, index: str) -> _Part:
    where = f"the index `{folder / index}`"
    try:
        content = json.loads(regular(folder / index).read_bytes().decode("utf-8"))
        places: dict[str, str] = content["weight_map"]
        files = list(dict.fromkeys(places.values()))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise VerifyError(
            f"{where} is damaged: it is no JSON with a `weight_map` from names to files ({why})."
        ) from None
    for file in files:
        # a link is fine, as in the cache of the hub; a path isn't
        if not isinstance(file, str) or not _PLAIN.fullmatch(file):
            raise VerifyError(
                f"{where} was refused: it names {file!r}, which isn't the plain name of a file in "
                "this folder."
            )
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        raise VerifyError(
            f"{where} names {_count(files)}, but {some([f'`{file}`' for file in missing])} "
            f"{'is' if len(missing) == 1 else 'are'} missing. Copy or download the whole folder."
        )
    whole = _Part(f"folder with {_count(files)} by {index}", {}, {})
    for file in files:
        part = _file(regular(folder / file))
        # a tensor may stand in several files, as in those of another save
        ours = {name for name in part.specs if places.get(name, file) == file}
        if twice := ours & whole.specs.keys():
            raise VerifyError(
                f"{where} doesn't say where `{printable(min(twice))}` is, and several files have "
                "it. Copy or download the whole folder anew."
            )
        whole.specs.update({name: part.specs[name] for name in part.specs if name in ours})
        whole.read.update({name: part.read[name] for name in part.read if name in ours})
        whole.tied.update({a: b for a, b in part.tied.items() if {a, b} <= ours})
    lost = [name for name in places if name not in whole.specs]
    if lost:
        raise VerifyError(
            f"{where} says that `{printable(lost[0])}` is in `{places[lost[0]]}`, but it isn't: "
            "files of different models are mixed here. Copy or download the whole folder anew."
        )
    return whole


def _count(files: Sequence[str]) -> str:
    return "1 file" if len(files) == 1 else f"{len(files)} files"
