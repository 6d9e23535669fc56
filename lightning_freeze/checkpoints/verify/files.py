"""A file or folder of weights -> names, dtypes and shapes, and one tensor at a time.

Nothing in a file is executed.
"""

from __future__ import annotations

import json
import pickle
import re
import shlex
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Union

import torch
from torch import Tensor

from lightning_freeze.checkpoints.verify.matching import escaped, printable, quoted, size, tidy
from lightning_freeze.errors import VerifyError
from lightning_freeze.model.index import some

TORCH = "torch"
SAFETENSORS = "safetensors"

_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"
# what safetensors calls dtypes: by their first letters, but for a few
_LETTERS = {"BF": "bfloat", "F": "float", "I": "int", "U": "uint", "C": "complex"}
_DTYPES = {"BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu"}
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_SUFFIXES = (".ckpt", ".safetensors", ".pt", ".pth", ".bin")
_NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "optimizer.bin")
_PLAIN = re.compile(r"[^./\\][^/\\]*")
# where training loops put the weights beside the rest
_NESTED = ("state_dict", "model_state_dict", "model")
# containers in each other that a file may hold
_DEEPEST = 100
_SAVE_ANEW = "save its weights as a state dict (`torch.save`) or with `save_pretrained`"


@dataclass(frozen=True)
class Spec:
    """What is known of a tensor before it is read: dtype, such as "float32", and shape."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {size(self.shape)}"


@dataclass(frozen=True)
class Weights:
    """Tensors in a file or folder, by name. Build it with `open_weights`.

    Attributes:
        path: as it was given.
        kind: what it is, in words.
        specs: name -> dtype and shape; the components that wrappers put into names are left out.
        content: all that a file of torch holds, None of any other.
    """

    path: str
    kind: str
    specs: Mapping[str, Spec]
    _read: Mapping[str, Callable[[], Tensor]] = field(repr=False)
    content: Any = field(default=None, repr=False)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: spec.shape for name, spec in self.specs.items()}

    def load(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            VerifyError: it isn't dense, or its bytes can't be read.
        """
        try:
            tensor = self._read[name]().detach()
        except Exception as error:
            raise VerifyError(
                f"`{name}` in {quoted(self.path)} can't be read: {escaped(str(error))}"
            ) from error
        if what := _odd(tensor):
            raise VerifyError(
                f"`{name}` in {quoted(self.path)} {what}; only dense tensors can be compared."
            )
        return tensor


def open_weights(path: Union[str, Path]) -> Weights:
    """Open weights for reading. No code in a file is run, and no tensor is copied.

    Args:
        path: a Lightning checkpoint, a state dict that `torch.save` wrote, a safetensors file, or
            a folder that `save_pretrained` wrote or that holds exactly one of these files.

    Raises:
        VerifyError: there is nothing of the kind, or it is refused or damaged.
    """
    target = Path(path)
    found = _folder(target) if target.is_dir() else _file(regular(target))
    if not found.specs:
        raise VerifyError(f"{quoted(path)} holds no tensors ({found.kind}). Name one with weights.")
    return _tidied(replace(found, path=str(path)))


def weights_in(content: Any, name: str = "the state dict") -> Weights:
    """The same for weights that are in memory already: a state dict, or what holds one.

    Args:
        content: name -> tensor, or a checkpoint's content.
        name: what messages call it.

    Raises:
        VerifyError: there are no tensors by name.
    """
    return _tidied(_of_torch(content, Path(name)))


def _tidied(found: Weights) -> Weights:
    short = tidy(found.specs)
    specs = {short[name]: spec for name, spec in found.specs.items()}
    return replace(found, specs=specs, _read={short[n]: read for n, read in found._read.items()})


def regular(path: Path) -> Path:
    """The path of a file that exists and isn't empty.

    Raises:
        VerifyError: it doesn't exist, is a folder or no ordinary file, or is empty.
    """
    if not path.exists():
        beside = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        close = [quoted(path.parent / name) for name in get_close_matches(path.name, beside, n=3)]
        raise VerifyError(
            f"There is no file or folder {quoted(path)}."
            f"{f' Close to it: {some(close)}.' if close else ''} Give a path on this machine; a "
            "model of the Hugging Face Hub has to be downloaded first, as by `hf download NAME "
            "--local-dir FOLDER`."
        )
    if not path.is_file():
        raise VerifyError(f"{quoted(path)} is a folder, a pipe or a device. Name a file.")
    if not path.stat().st_size:
        raise VerifyError(f"{quoted(path)} is empty. Was writing it cut off? Get it again.")
    return path


def format_of(path: Path) -> str:
    """`TORCH`, `SAFETENSORS`, or "" for anything else, by the first bytes."""
    with path.open("rb") as stream:
        start = stream.read(9)
    if start.startswith(_ZIP):
        return TORCH
    # torch before 2.6 reads a tar archive by an unpickler that runs code
    if start.startswith(_PICKLE) and not tarfile.is_tarfile(path):
        return TORCH
    # the length of the header in eight bytes, then the header: JSON
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 100_000_000:
        return SAFETENSORS
    return ""


def _file(path: Path) -> Weights:
    kind = format_of(path)
    if kind == SAFETENSORS or path.suffix == ".safetensors":
        return _safetensors(path)
    if kind == TORCH:
        return _of_torch(load(path), path)
    with path.open("rb") as stream:
        start = stream.read(24)
    raise VerifyError(
        f"{quoted(path)} is neither a checkpoint or state dict that `torch.save` wrote nor a "
        f"safetensors file, or is damaged: it begins with {start!r}. Open it with what wrote it, "
        f"and {_SAVE_ANEW}."
    )


def _safetensors(path: Path) -> Weights:
    from safetensors import SafetensorError, safe_open

    try:
        file: Any = safe_open(str(path), framework="pt", device="cpu")
        slices = {name: file.get_slice(name) for name in sorted(file.keys(), key=natural)}
        specs = {n: _stored(s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise VerifyError(
            f"{quoted(path)} is no whole safetensors file: it is cut off or damaged "
            f"({escaped(str(error))}). Get it again."
        ) from None
    read = {name: partial(file.get_tensor, name) for name in specs}
    return Weights(str(path), "safetensors", specs, read)


def _stored(dtype: str, shape: tuple[int, ...]) -> Spec:
    """What a tensor of a safetensors file becomes; torch counts numbers of four bits in pairs."""
    if dtype == "F4" and shape:
        return Spec("float4_e2m1fn_x2", (*shape[:-1], shape[-1] // 2))
    letters = dtype.rstrip("0123456789") if "_" not in dtype else "F"
    called = _LETTERS.get(letters, letters) + dtype.removeprefix(letters).lower()
    return Spec(_DTYPES.get(dtype, called), shape)


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts `layer.2` before `layer.10`."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(parts)]


def load(path: Path) -> Any:
    """Load what `torch.save` wrote; tensors stay on the disk until they are read.

    `weights_only=True` is given outright: `TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD` has a say only where
    a call leaves it out.

    Raises:
        VerifyError: the file asks for more than tensors and plain values, or is damaged.
    """
    where = quoted(path)
    with path.open("rb") as stream:
        zipped = stream.read(4) == _ZIP
    if zipped:
        _check_archive(path, where)
    try:
        with warnings.catch_warnings():
            # torch warns of a pickle protocol that it then can't read
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        message = str(error)
    except Exception as error:  # a damaged pickle fails in any way it likes
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise VerifyError(
            f"{where} can't be read: it is cut off or damaged, or torch refuses it (it says: "
            f"{escaped(first)}). Get it again, or take an earlier checkpoint."
        ) from error
    named = re.search(r"GLOBAL (\S+)", message)
    if named is None:
        last = message.partition("WeightsUnpickler error: ")[2].strip() or message
        raise VerifyError(
            f"{where} holds something else than tensors and plain values, or is damaged (torch "
            f"says: {escaped(last.splitlines()[0])}). Nothing of it was executed."
        )
    raise VerifyError(
        f"{where} was refused: to read it, `{escaped(named[1])}` would have to be called, and a "
        "file that may call functions can run any code. Nothing of it was executed. If you trust "
        "where it comes from, save its weights alone, and verify those: "
        f'`torch.save(torch.load({str(path)!r}, weights_only=False)["state_dict"], "weights.pt")`.'
    )


def _check_archive(path: Path, where: str) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        raise VerifyError(
            f"{where} is cut off or damaged: its table of contents, which stands at its end, can't "
            f"be read ({escaped(str(error))}). Get it again, or take an earlier checkpoint."
        ) from None
    inside = {entry.filename.partition("/")[2] for entry in entries}
    if "constants.pkl" in inside:
        raise VerifyError(
            f"{where} is a TorchScript archive: it holds code, which isn't loaded here. Where you "
            f"trust it, {_SAVE_ANEW}."
        )
    if "data.pkl" not in inside:
        raise VerifyError(f"{where} is a zip archive, but not one that `torch.save` wrote.")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise VerifyError(
            f"{where} was refused: it is a compressed archive, which torch never writes, and a "
            "small one can unpack to any size. Take the file as `torch.save` wrote it."
        )


def _of_torch(content: Any, path: Path) -> Weights:
    kind, tensors = _tensors_of(content, path)
    specs = {
        # a nested tensor has no shape to ask for
        name: Spec(str(t.dtype).removeprefix("torch."), () if t.is_nested else tuple(t.shape))
        for name, t in tensors.items()
    }
    read = {name: partial(_itself, tensor) for name, tensor in tensors.items()}
    return Weights(str(path), kind, specs, read, content)


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
    if tensor.layout != torch.strided:
        return f"has the layout {tensor.layout}"
    # a few bytes on the disk would become any number of them
    larger = tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
    return "is larger than its storage (a view that repeats its elements)" if larger else ""


def _tensors_of(content: Any, path: Path) -> tuple[str, dict[str, Tensor]]:
    """What a file is, in words, and the tensors of its state dict.

    What stands beside a state dict, such as the state of optimizers, isn't looked at.
    """
    if isinstance(content, Mapping):
        for key in _NESTED:
            inside = content.get(key)
            if isinstance(inside, Mapping) and (found := _named(inside, path)):
                lightning = "pytorch-lightning_version" in content
                return ("Lightning checkpoint" if lightning else "checkpoint"), found
        if found := _named(content, path):
            return "state dict", found
        keys = some([f"`{printable(str(key))}`" for key in content], most=8) or "nothing"
        what = f"a dict with {keys}"
    else:
        what = f"one {type(content).__name__}"
    raise VerifyError(
        f"{quoted(path)} holds {what}, but no tensors where weights stand: by name, or in a dict "
        "under `state_dict`. Save the model's `state_dict()` instead."
    )


def _named(content: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict; modules may keep other state of theirs in it."""
    found: dict[str, Tensor] = {}
    hidden: list[str] = []
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            found[name] = value
            continue
        extra = isinstance(name, str) and name.rpartition(".")[2] == "_extra_state"
        for full, tensor in _walk(value, str(name), path, [], set()):
            if extra and full not in content and full not in found:
                found[full] = tensor
            else:
                hidden.append(full)
    if found and hidden:
        raise VerifyError(
            f"{quoted(path)} wasn't compared: beside tensors by name, such as "
            f"`{printable(next(iter(found)))}`, it holds others, such as `{printable(hidden[0])}`, "
            "that would be passed over. Save what is to be compared as a state dict of its own: "
            '`torch.save(model.state_dict(), "weights.pt")`.'
        )
    return found


def _walk(
    value: Any, name: str, path: Path, above: list[int], done: set[int]
) -> Iterator[tuple[str, Tensor]]:
    """All tensors in plain values, with dotted names."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (Mapping, list, tuple, set, frozenset)) and id(value) not in done:
        if id(value) in above or len(above) == _DEEPEST:
            raise VerifyError(
                f"{quoted(path)} was refused: `{printable(name)[:60]}` holds itself, or more than "
                f"{_DEEPEST} containers in each other."
            )
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            yield from _walk(inner, f"{name}.{key}", path, [*above, id(value)], done)
        done.add(id(value))


def _folder(path: Path) -> Weights:
    where = quoted(path)
    if (path / ".metadata").exists():
        raise VerifyError(
            f"{where} is a folder of torch.distributed.checkpoint. Its `.metadata` is a pickle "
            "that may run code, so it was refused; nothing of it was executed. If you trust where "
            "it comes from, make one file of it: `python -m torch.distributed.checkpoint."
            f"format_utils dcp_to_torch {escaped(shlex.quote(str(path)))} weights.pt`."
        )
    for name in _WHOLE:
        if (path / name).exists():
            return replace(_file(regular(path / name)), kind=f"folder with {name}")
        if (path / f"{name}.index.json").exists():
            return _shards(path, f"{name}.index.json")
    files = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES and _may_be_weights(p))
    if len(files) == 1:
        return replace(_file(regular(files[0])), kind=f"folder with {escaped(files[0].name)}")
    if files:
        listed = some([quoted(file) for file in files], most=8)
        raise VerifyError(f"{where} holds {len(files)} files of weights. Name one: {listed}.")
    there = some(sorted(quoted(p.name) for p in path.iterdir()), most=8) or "nothing"
    raise VerifyError(
        f"{where} is a folder without weights. Looked for {', '.join(_WHOLE)}, their .index.json, "
        f"and one file with {', '.join(_SUFFIXES)}; there is {there}."
    )


def _may_be_weights(path: Path) -> bool:
    return path.name not in _NO_WEIGHTS and not path.name.startswith(("rng_state", "."))


def _shards(folder: Path, index: str) -> Weights:
    where = f"the index {quoted(folder / index)}"
    again = "Copy or download the whole folder anew."
    try:
        content = json.loads(regular(folder / index).read_bytes().decode("utf-8"))
        places: dict[str, str] = content["weight_map"]
        files = list(dict.fromkeys(places.values()))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise VerifyError(
            f"{where} is damaged: it is no JSON with a `weight_map` from names to files. {again}"
        ) from None
    specs: dict[str, Spec] = {}
    read: dict[str, Callable[[], Tensor]] = {}
    for file in files:
        # a link is fine, as in the cache of the hub; a path isn't
        if not isinstance(file, str) or not _PLAIN.fullmatch(file):
            raise VerifyError(
                f"{where} was refused: it names {file!r}, which isn't the plain name of a file in "
                "this folder."
            )
        if not (folder / file).exists():
            raise VerifyError(f"{where} names {quoted(file)}, which is missing. {again}")
        part = _file(regular(folder / file))
        # a tensor may stand in several files, as in those of another save
        ours = [name for name in part.specs if places.get(name, file) == file]
        if twice := [name for name in ours if name in specs]:
            raise VerifyError(
                f"{where} doesn't say where `{printable(twice[0])}` is, and several files have it. "
                f"{again}"
            )
        specs.update({name: part.specs[name] for name in ours})
        read.update({name: part._read[name] for name in ours})
    if lost := [name for name in places if name not in specs]:
        raise VerifyError(
            f"{where} says that `{printable(lost[0])}` is in {quoted(places[lost[0]])}, but it "
            f"isn't: files of different models are mixed here. {again}"
        )
    return Weights(str(folder), f"folder with {len(files)} files by {index}", specs, read)
