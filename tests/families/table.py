"""All rows of the table of families, and the page that shows them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from tests.families.known import DIFFERS, LIMITS, TIMM, TORCHVISION, TRANSFORMERS
from tests.families.rows import Row, row_of
from tests.families.tiny import depths, on_meta

_HEADER = ("family", "class", "rule", "blocks", "above them", "head")


def transformers_rows(families: Iterable[str] = TRANSFORMERS) -> Iterator[tuple[Row, list[int]]]:
    """A row for each family, and the numbers of layers that its config names."""
    for family in families:
        model: Any = on_meta(family)
        yield row_of(family, model), depths(model.config)


def timm_rows(names: Iterable[str] = TIMM) -> Iterator[Row]:
    """A row for each model of timm."""
    import timm

    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False)
        yield row_of(name, model)


def torchvision_rows(names: Iterable[str] = TORCHVISION) -> Iterator[Row]:
    """A row for each model of torchvision."""
    for name in names:
        yield row_of(name, torchvision_model(name))


def torchvision_model(name: str) -> nn.Module:
    """A model on the meta device; nothing is downloaded."""
    from torchvision import models

    kwargs: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        kwargs["init_weights"] = False
    if any(part in name for part in ("deeplab", "fcn", "lraspp", "rcnn", "retina", "fcos", "ssd")):
        kwargs["weights_backbone"] = None
    with torch.device("meta"):
        model: nn.Module = models.get_model(name, weights=None, **kwargs)
    return model


def differs(row: Row, named: Iterable[int]) -> bool:
    """Whether some stack hasn't as many blocks as any number of layers in the config."""
    return not row.sizes or not set(row.sizes) <= set(named)


def _lines(rows: Iterable[Row]) -> Iterator[str]:
    yield "| " + " | ".join(_HEADER) + " |"
    yield "| " + " | ".join("---" for _ in _HEADER) + " |"
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") or "-" for cell in row.cells()) + " |"


def made_with() -> str:
    """The versions that the page was made with."""
    libraries = [f"{name} {version(name)}" for name in ("transformers", "timm", "torchvision")]
    return f"Versions: {', '.join(libraries)}."


def page(transformers: list[tuple[Row, list[int]]], timm: list[Row], torchvision: list[Row]) -> str:
    """The page docs/families.md."""
    odd = [row.family for row, named in transformers if differs(row, named)]
    lines = [
        "# Families of models, and what is found in each",
        "",
        "Made by `python -m tests.families --write`; a test compares it. Each model is built from "
        "its default config with at most four layers a tower and three a decoder (transformers), "
        "or as it is (timm, torchvision), without weights. In each of them every parameter is in "
        "exactly one layer group, in data-flow order. `a.0-3 (4)` are the blocks `a.0` to `a.3`.",
        "",
        made_with(),
        "",
        f"## transformers: {len(transformers)} families",
        "",
        f"In {len(transformers) - len(odd)} of them each stack has as many blocks as the config "
        f"has layers; the other {len(odd)} are explained below.",
        "",
        *_lines(row for row, _ in transformers),
        "",
        "### Where the number of blocks isn't one that the config names",
        "",
        *(f"- {family}: {DIFFERS.get(family, 'NOT EXPLAINED')}" for family in odd),
        "",
        f"## timm: {len(timm)} models",
        "",
        *_lines(timm),
        "",
        f"## torchvision: {len(torchvision)} models",
        "",
        *_lines(torchvision),
        "",
        "## What we get wrong, or refuse",
        "",
        *(f"- {what}: {why}" for what, why in LIMITS.items()),
    ]
    return "\n".join(lines) + "\n"
