"""What a user names -> a model. The only place that imports a library of models.

Models are built on the meta device: shapes without content, so that any size fits.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import json
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_freeze.errors import ArgumentError, DiscoveryError

_KINDS = (
    "Write a folder that `save_pretrained` wrote, a config.json, a name on the hub, `timm:NAME`, "
    "`torchvision:NAME`, or `package.module:callable`."
)


@dataclass(frozen=True)
class Source:
    """A model, and where it comes from.

    Attributes:
        model: on the meta device, unless its weights were asked for.
        about: in words.
        notes: what to know about it.
    """

    model: nn.Module
    about: str
    notes: tuple[str, ...] = ()


def find_model(
    name: str,
    *,
    task: str | None = None,
    class_name: str | None = None,
    weights: bool = False,
) -> Source:
    """Build the model that a user names.

    Args:
        name: a folder or a config of transformers, a name on its hub, `timm:NAME`,
            `torchvision:NAME`, or `package.module:callable`.
        task: for transformers, such as "sequence-classification".
        class_name: for transformers, such as "BertForMaskedLM".
        weights: load them, too.

    Returns:
        A `Source`.

    Raises:
        DiscoveryError: there is no such model; the message names the closest.
        ArgumentError: it is there and can't be built.
    """
    exists = os.path.exists(os.path.expanduser(name))
    prefix, colon, rest = name.partition(":")
    ours = not exists and bool(colon)
    if (task or class_name) and ours:
        option = "--task" if task else "--class"
        raise ArgumentError(f"`{option}` is for models of transformers; `{name}` is none.")
    if task and class_name:
        raise ArgumentError("`--task` and `--class` say the same thing. Leave one of them out.")
    if not name.strip():
        raise ArgumentError(f"The model's name is empty. {_KINDS}")
    if ours and prefix == "timm":
        return _timm(rest, weights)
    if ours and prefix == "torchvision":
        return _torchvision(rest, weights)
    if ours:
        return _callable(prefix, rest, weights)
    return _transformers(name, task, class_name, weights)


def _closest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(f'`{each}`' for each in close)}?" if close else ""


def _missing(library: str, error: Exception) -> ArgumentError:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return ArgumentError(
        f"{library} can't be imported ({type(cause).__name__}: {cause}). Install it: "
        f"`pip install {library}`."
    )


def _built(make: Callable[[], Any], about: str, weights: bool) -> tuple[Any, tuple[str, ...]]:
    """On the meta device where that is possible: some models need numbers while they are built."""
    notes: tuple[str, ...] = ()
    with _quiet():
        if not weights:
            try:
                with torch.device("meta"):
                    return make(), ()
            except Exception:  # any model of anybody's is built here
                notes = (f"{about} can't be built without numbers: it was built in memory.",)
        try:
            return make(), notes
        except Exception as error:
            raise ArgumentError(
                f"{about} can't be built: {type(error).__name__}: {error}{_where(error)}"
            ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Libraries talk while they build; what matters here is the result."""
    loggers = [logging.getLogger(name) for name in ("transformers", "timm", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _where(error: BaseException) -> str:
    """The last line of a user's own code that an error went through."""
    if isinstance(error, SyntaxError):
        return ""  # it says so itself
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename != __file__ and "<frozen" not in frame[0]]
    if not own:
        return ""
    return f" ({own[-1].filename}, line {own[-1].lineno}: {own[-1].line})"


def _timm(name: str, weights: bool) -> Source:
    try:
        import timm
    except Exception as error:  # a broken installation raises anything
        raise _missing("timm", error) from error
    if not timm.is_model(name.split(".")[0]):
        close = _closest(name, timm.list_models())
        raise DiscoveryError(f"timm has no model `{name}`.{close}")
    about = f"timm:{name}"
    model, notes = _built(lambda: timm.create_model(name, pretrained=weights), about, weights)
    return Source(model, about, notes)


def _torchvision(name: str, weights: bool) -> Source:
    try:
        from torchvision import models
    except Exception as error:
        raise _missing("torchvision", error) from error
    known = models.list_models()
    if name.lower() not in known:
        raise DiscoveryError(f"torchvision has no model `{name}`.{_closest(name, known)}")
    about = f"torchvision:{name}"
    options: dict[str, Any] = {"weights": "DEFAULT" if weights else None}
    if not weights and "weights_backbone" in inspect.signature(_builder(name)).parameters:
        options["weights_backbone"] = None
    model, notes = _built(lambda: models.get_model(name, **options), about, weights)
    return Source(model, about, notes)


def _builder(name: str) -> Any:
    from torchvision import models

    return models.get_model_builder(name)


def _callable(module_name: str, path: str, weights: bool) -> Source:
    name = f"{module_name}:{path}"
    if not re.fullmatch(r"\w+(\.\w+)*", module_name) or not path:
        raise ArgumentError(f"`{name}` is no file or folder, and no name of a model. {_KINDS}")
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        importlib.invalidate_caches()
        module = _import(module_name, name)
        found: Any = module
        for position, part in enumerate(path.split(".")):
            if not hasattr(found, part):
                inside = [key for key in dir(found) if not key.startswith("_")]
                raise DiscoveryError(
                    f"`{'.'.join([module_name, *path.split('.')[:position]])}` has no "
                    f"`{part}`.{_closest(part, inside)}"
                )
            found = getattr(found, part)
        if isinstance(found, nn.Module):
            return Source(found, name)
        if not callable(found):
            raise ArgumentError(
                f"`{name}` is {found!r}, which is neither a model nor a function that makes one."
            )
        _check_arguments(found, name)
        model, notes = _built(found, f"`{name}`", weights)
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"`{name}` returned {_shown(model)}, not a model. Write a function that returns a "
            "`torch.nn.Module`."
        )
    return Source(model, name, notes)


def _shown(value: Any) -> str:
    return "None" if value is None else f"an object of the type {type(value).__name__}"


def _import(module_name: str, name: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        parents = module_name.split(".")
        if str(error.name) in (".".join(parents[:n]) for n in range(1, len(parents) + 1)):
            files = [path.stem for path in Path.cwd().glob("*.py")]
            raise DiscoveryError(
                f"There is no module `{error.name}` for `{name}`: Python looked in this folder "
                f"and in what is installed.{_closest(str(error.name), files)}"
            ) from error
        raise _import_failed(module_name, error) from error
    except (Exception, SystemExit) as error:
        raise _import_failed(module_name, error) from error


def _import_failed(module_name: str, error: BaseException) -> ArgumentError:
    return ArgumentError(
        f"Importing `{module_name}` failed: {type(error).__name__}: {error}{_where(error)}"
    )


def _check_arguments(function: Any, name: str) -> None:
    try:
        takes = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in takes if p.default is p.empty and p.kind not in free]
    if needed:
        arguments = ", ".join(f"{each}=..." for each in needed)
        raise ArgumentError(
            f"`{name}` needs arguments ({', '.join(needed)}), and none can be given here. Write a "
            f"function without any, such as `def make(): return {name.split(':')[1]}({arguments})`,"
            " and name that."
        )


def _transformers(name: str, task: str | None, class_name: str | None, weights: bool) -> Source:
    path = Path(os.path.expanduser(name))
    _check_path(path, name)
    try:
        import transformers

        auto_config: Any = transformers.AutoConfig
        auto_model: Any = transformers.AutoModel
    except Exception as error:
        raise _missing("transformers", error) from error
    with _quiet():
        config = _config(auto_config, path, name)
    notes = []
    kind = _class(transformers, config, task, class_name)
    named = (getattr(config, "architectures", None) or [None])[0]
    if kind is None:
        kind = auto_model
        if named:
            notes.append(
                f"transformers has no class `{named}`, which the config names; its code isn't "
                "run. This is the model without a head."
            )
    if getattr(config, "quantization_config", None) is not None and not weights:
        notes.append("The weights are quantised; the numbers are those of the model before that.")
    about = f"{name} ({kind.__name__ if kind is not auto_model else 'AutoModel'})"
    if weights:
        if path.is_file():
            raise ArgumentError(f"`--weights` needs a folder with weights; `{name}` is a config.")
        model, more = _built(lambda: kind.from_pretrained(str(path if path.exists() else name)),
                             about, weights)  # fmt: skip
    else:
        make = kind.from_config if hasattr(kind, "from_config") else kind._from_config
        model, more = _built(lambda: make(config), about, weights)
    if type(model).__name__ != kind.__name__:
        about = f"{name} ({type(model).__name__})"
    return Source(model, about, (*notes, *more))


def _check_path(path: Path, name: str) -> None:
    if path.is_dir() and not (path / "config.json").is_file():
        raise DiscoveryError(
            f"The folder `{name}` has no config.json, so it isn't one of transformers. {_KINDS}"
        )
    local = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    local = local or name.endswith((".json", ".py", ".pt", ".ckpt", ".safetensors"))
    if not path.exists() and (local or not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", name)):
        folder = path.parent if path.parent.is_dir() else Path.cwd()
        beside = [each.name for each in folder.iterdir()]
        raise DiscoveryError(
            f"There is no file or folder `{name}`.{_closest(path.name, beside)} {_KINDS}"
        )
    if path.is_file():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, UnicodeDecodeError) as error:
            raise DiscoveryError(f"`{name}` is not JSON: {error}. {_KINDS}") from error
        if not isinstance(content, dict) or "model_type" not in content:
            raise DiscoveryError(
                f"`{name}` has no key `model_type`, so it isn't a config of transformers. {_KINDS}"
            )


def _config(auto: Any, path: Path, name: str) -> Any:
    try:
        return auto.from_pretrained(str(path) if path.exists() else name)
    except Exception as error:
        if path.exists():
            raise ArgumentError(
                f"The config of `{name}` can't be read: {type(error).__name__}: {_short(error)}"
            ) from error
        raise DiscoveryError(
            f"`{name}` is no file or folder here, and the hub doesn't give it: it isn't there, "
            f"or can't be reached ({_short(error)}). Offline, name a folder that "
            f"`save_pretrained` wrote, or its config.json. {_KINDS}"
        ) from error


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:157] + "..."


def _class(library: Any, config: Any, task: str | None, class_name: str | None) -> Any:
    """The class to build; None if the config names one that isn't there."""
    if class_name is not None:
        found = getattr(library, class_name, None)
        if not isinstance(found, type):
            known = [key for key in dir(library) if key[0].isupper()]
            raise DiscoveryError(
                f"transformers has no class `{class_name}`.{_closest(class_name, known)}"
            )
        return found
    tasks = {
        _dashed(key.removeprefix("AutoModelFor")): key
        for key in dir(library)
        if key.startswith("AutoModelFor")
    }
    if task is not None:
        wanted = _ALSO.get(task.replace("_", "-").lower(), task.replace("_", "-").lower())
        if wanted not in tasks:
            raise DiscoveryError(
                f"transformers has no task `{task}`.{_closest(wanted, tasks)} There are: "
                f"{', '.join(sorted(tasks))}."
            )
        return getattr(library, tasks[wanted])
    named = (getattr(config, "architectures", None) or [None])[0]
    return getattr(library, named, None) if named else None


# what pipelines call them
_ALSO = {
    "text-classification": "sequence-classification",
    "text-generation": "causal-lm",
    "fill-mask": "masked-lm",
    "summarization": "seq2seq-lm",
    "translation": "seq2seq-lm",
    "ner": "token-classification",
}


def _dashed(name: str) -> str:
    """`SequenceClassification` -> `sequence-classification`, `CausalLM` -> `causal-lm`."""
    words = re.findall(r"Seq2Seq|CTC|LM|LMHead|QA|[A-Z][a-z0-9]*|[A-Z]+(?![a-z])", name)
    return "-".join(word.lower() for word in words)
