"""Files, and maybe a certificate -> what was found of each tensor."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Union

import torch
from torch import Tensor

from lightning_freeze.checkpoints.certificate import (
    Certificate,
    Certified,
    certificate_in,
    read_certificate,
    sha256,
)
from lightning_freeze.checkpoints.verify import result as told
from lightning_freeze.checkpoints.verify.files import Weights, open_weights
from lightning_freeze.checkpoints.verify.matching import (
    CERTIFICATE,
    Match,
    SeveralPlacesError,
    escaped,
    match,
    quoted,
    tidy,
)
from lightning_freeze.checkpoints.verify.result import Side, TensorResult, Verification
from lightning_freeze.errors import ArgumentError, VerifyError
from lightning_freeze.fingerprint import fingerprint

_File = Union[str, Path]
# elements at a time; a difference is worked out in float64
_CHUNK = 1 << 20
# components of a name that a layer group may have
_DEEPEST = 32


def verify(
    base: _File | None,
    checkpoint: _File,
    certificate: _File | None = None,
    prefix: str | None = None,
    *,
    own: bool = True,
) -> Verification:
    """Compare the weights of two files, or of one with a certificate, to the bit.

    Args:
        base: what the run began with.
        checkpoint: what is to be verified.
        certificate: what says which tensors were frozen, and with which bytes; the one that
            `checkpoint` holds, if it holds one, where None.
        prefix: where the common part begins, in whichever file holds it several times.
        own: whether the certificate in `checkpoint` counts.

    Raises:
        VerifyError: a file can't be read or is refused, or they are of different models.
        ArgumentError: there is nothing to compare with.
    """
    after = open_weights(checkpoint)
    before = None if base is None else open_weights(base)
    chosen = _certificate(certificate, after, own=own)
    if before is None and chosen.certificate is None:
        raise ArgumentError(
            f"There is nothing to compare {quoted(checkpoint)} with: it holds no certificate. Give "
            "two files, or `--certificate FILE`."
        )
    at = Match("", "", {})
    if before is not None:
        at = match(before.shapes, after.shapes, prefix)
    promised = _Promised(chosen.certificate, after, prefix, alone=before is None)
    in_base = {new: old for old, new in at.names.items()}
    names = list(dict.fromkeys([*after.specs, *in_base, *promised.entries]))
    groups = group_names(names)
    results = []
    for name in names:
        result = TensorResult(name, groups[name], None, after.specs.get(name), told.NOT_COMPARED)
        if before is not None:
            result = _against_base(result, before, in_base.get(name), after)
        results.append(promised.held(result) if name in promised.entries else result)
    if before is not None:
        _check_layers(results)
    frozen = chosen.certificate.frozen if chosen.certificate else {}
    return Verification(
        base=None if before is None else _side(before, at.left),
        checkpoint=_side(after, at.right),
        tensors=tuple(results),
        certificate=chosen.certificate,
        certificate_side=Side(chosen.path, "certificate", len(frozen), promised.prefix),
        notes=(*chosen.notes, *told.findings(chosen.certificate)),
    )


@dataclass(frozen=True)
class _Chosen:
    """The certificate that counts, where it was read from, and what to say of that."""

    certificate: Certificate | None
    path: str
    notes: tuple[str, ...] = ()


def _certificate(given: _File | None, checkpoint: Weights, *, own: bool) -> _Chosen:
    path = checkpoint.path
    inside = certificate_in(checkpoint.content, quoted(path)) if own or given == path else None
    chosen = _Chosen(inside, f"in {path}")
    if given is not None and str(given) != path:
        chosen = _Chosen(read_certificate(given), str(given))
    elif given is not None and inside is None:
        read_certificate(given)  # says what it holds instead
    found = chosen.certificate
    if found is None or found.frozen or told.about_weights(found):
        return chosen
    of_nothing = f"{_upper(chosen.path)} certifies no tensor: {told.released(found)}."
    if inside is not None and inside.frozen:
        note = f"{of_nothing} {_upper(path)} holds a certificate of its own, which was taken."
        return _Chosen(inside, f"in {path}", (note,))
    best = _best(checkpoint) if found.until else ""
    said = [of_nothing, best, _OR_ALL, *told.findings(found)]
    raise VerifyError(" ".join(filter(None, said)))


_OR_ALL = "All tensors of two files are compared with `--no-certificate`."


def _upper(path: str) -> str:
    return quoted(path) if not path.startswith("in ") else f"The certificate {escaped(path)}"


def _best(checkpoint: Weights) -> str:
    """What to write where nothing was frozen any more: earlier checkpoints have certificates."""
    callbacks = (checkpoint.content or {}).get("callbacks")
    states = callbacks.values() if isinstance(callbacks, Mapping) else ()
    paths = [state.get("best_model_path") for state in states if isinstance(state, Mapping)]
    best = next((path for path in paths if isinstance(path, str) and path), "best.ckpt")
    command = f"lightning-freeze verify {escaped(shlex.quote(best))}"
    return f"An earlier checkpoint is verified against the certificate that it holds: `{command}`."


class _Promised:
    """What a certificate says, by the names of CHECKPOINT, and whether it holds."""

    def __init__(
        self, certificate: Certificate | None, checkpoint: Weights, prefix: str | None, alone: bool
    ) -> None:
        self.checkpoint = checkpoint
        self.entries: dict[str, Certified] = {}
        self.prefix = ""
        self._fits: dict[str, bool] = {}
        self._ties: dict[tuple[object, ...], list[str]] = {}
        if certificate is None or not certificate.frozen:
            return
        self._digest = sha256 if certificate.digest == "sha256" else fingerprint
        short = tidy(certificate.frozen)
        shapes = {short[name]: entry.shape for name, entry in certificate.frozen.items()}
        sides = (CERTIFICATE, "CHECKPOINT")
        try:
            # beside a BASE, a prefix is about that: here it only decides what is open
            at = match(shapes, checkpoint.shapes, prefix if alone else None, sides)
        except SeveralPlacesError:
            if prefix is None:
                raise
            at = match(shapes, checkpoint.shapes, prefix, sides)
        self.prefix = at.left
        for name, entry in certificate.frozen.items():
            new = at.names[short[name]]
            self.entries[new] = entry
            self._ties.setdefault(self._tie(entry, name), []).append(new)
        self._first = {at.names[short[name]]: name for name in certificate.frozen}

    @staticmethod
    def _tie(entry: Certified, name: str) -> tuple[object, ...]:
        return entry.tied_to or name, entry.fingerprint, entry.dtype, entry.shape

    def held(self, result: TensorResult) -> TensorResult:
        """Whether a certified tensor is as it has to be."""
        name, promise = result.name, self.entries[result.name]
        if result.checkpoint is None:
            # one name of a tied tensor is enough: safetensors keeps no more
            names = self._ties[self._tie(promise, self._first[name])]
            mark = told.HELD if any(map(self.fits, names)) else told.MISSING
            return replace(result, certified=mark)
        if not self.fits(name):
            return replace(result, certified=told.BROKEN)
        renewed = promise.reinitialised and result.status in told.UNLIKE
        as_base = result.status == told.IDENTICAL or result.converted or renewed
        from_the_start = promise.step == 0 and result.base is not None
        mark = told.NOT_BASE if from_the_start and not as_base else told.HELD
        return replace(result, certified=mark, reinitialised=renewed)

    def fits(self, name: str) -> bool:
        """Whether CHECKPOINT has a tensor, and it is as certified."""
        if name not in self._fits:
            promise, spec = self.entries[name], self.checkpoint.specs.get(name)
            self._fits[name] = (
                spec is not None
                and (spec.dtype, spec.shape) == (promise.dtype, promise.shape)
                and self._digest(self.checkpoint.load(name)) == promise.fingerprint
            )
        return self._fits[name]


def _against_base(
    result: TensorResult, base: Weights, old: str | None, checkpoint: Weights
) -> TensorResult:
    result = replace(result, base=base.specs[old] if old is not None else None)
    if old is None or result.base is None:
        alone = told.ONLY_CHECKPOINT if result.checkpoint else told.NOT_COMPARED
        return replace(result, status=alone)
    if result.checkpoint is None:
        return replace(result, status=told.ONLY_BASE)
    if result.base.shape != result.checkpoint.shape:
        return replace(result, status=told.OTHER_SHAPE)
    one, two = base.load(old), checkpoint.load(result.name)
    if identical(one, two):
        return replace(result, status=told.IDENTICAL)
    return replace(
        result,
        status=told.CHANGED if one.dtype == two.dtype else told.OTHER_DTYPE,
        difference=largest_difference(one, two),
        converted=converted(one, two),
    )


def _side(weights: Weights, prefix: str) -> Side:
    return Side(weights.path, weights.kind, len(weights.specs), prefix)


def _check_layers(results: Iterable[TensorResult]) -> None:
    """Refuse models whose main numbered stack has another number of layers."""
    sizes: Counter[str] = Counter()
    layers: dict[str, tuple[set[str], set[str]]] = {}
    for result in results:
        stack, _, number = result.group.rpartition(".")
        if number.isdigit() and (result.base or result.checkpoint):
            sizes[stack] += 1
            both = layers.setdefault(stack, (set(), set()))
            for side, spec in zip(both, (result.base, result.checkpoint)):
                side.update([number] if spec else [])
    shared = [stack for stack, (one, two) in layers.items() if one and two]
    main = max(shared, key=lambda stack: sizes[stack], default="")
    one, two = layers.get(main, (set(), set()))
    if len(one) != len(two):
        raise VerifyError(
            f"BASE and CHECKPOINT are different models: `{main or '(the model itself)'}` has "
            f"{len(one)} layers in BASE and {len(two)} in CHECKPOINT. Name the weights that the "
            "run began with as BASE."
        )


def group_names(names: Iterable[str]) -> dict[str, str]:
    """The layer group of each tensor, by names alone: there is no model to ask.

    The layers of a numbered stack (`encoder.layer.3`, `features.0`) are a group each. A module
    that contains a stack is split; any other is one group.

    >>> names = ["net.embed.w", "net.layer.0.a.w", "net.layer.1.a.w", "net.layer.1.b.0.w", "head.w"]
    >>> list(dict.fromkeys(group_names(names).values()))
    ['net.embed', 'net.layer.0', 'net.layer.1', 'head']
    """
    parts = {name: tuple(name.split(".", _DEEPEST)) for name in names}
    numbered: dict[tuple[str, ...], set[str]] = {}
    for path in parts.values():
        for depth, part in enumerate(path[:-1]):
            if part.isdigit():
                numbered.setdefault(path[:depth], set()).add(part)
    stacks = {path for path, numbers in numbered.items() if len(numbers) > 1}
    # what contains numbers; a lone module at the top is no group either
    split = {path[:depth] for path in numbered for depth in range(len(path) + 1)} | {()}
    tops = {path[:1] for path in parts.values()}
    if len(tops) == 1 and any(len(path) > 2 for path in parts.values()):
        split |= tops
    found = {}
    for name, path in parts.items():
        depth = 0
        while path[:depth] in split and depth < len(path):
            layer = path[:depth] in stacks and path[depth].isdigit()
            depth += 1
            if layer:
                break
        found[name] = ".".join(path[:depth])
    return found


def identical(one: Tensor, two: Tensor) -> bool:
    """Equal in dtype, shape and every bit: NaN equals itself, -0.0 differs from 0.0.

    >>> identical(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    True
    >>> identical(torch.tensor([0.0]), torch.tensor([-0.0]))
    False
    """
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    left, right = _bytes(one), _bytes(two)
    if all(part.storage_offset() % 8 == part.numel() % 8 == 0 for part in (left, right)):
        # eight bytes at a time are eight times as fast
        left, right = left.view(torch.int64), right.view(torch.int64)
    return torch.equal(left, right)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def converted(one: Tensor, two: Tensor) -> bool:
    """Whether one tensor, converted to the dtype of another, is identical to that.

    >>> half = torch.tensor([0.1], dtype=torch.float16)
    >>> converted(torch.tensor([0.1]), half), converted(torch.tensor([0.2]), half)
    (True, False)
    """
    if one.dtype == two.dtype or not (one.is_floating_point() and two.is_floating_point()):
        return False
    try:
        return identical(one.to(two.dtype), two)
    except NotImplementedError:  # numbers of four bits
        return False


def largest_difference(one: Tensor, two: Tensor) -> float | None:
    """The largest absolute difference of two tensors of one shape.

    Returns:
        0.0 where only bits differ that don't change a value (-0.0 and 0.0, two kinds of NaN), NaN
        where one has a NaN and the other a number, None of other kinds of numbers than floats.

    Example:
        >>> largest_difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]))
        0.5
        >>> largest_difference(torch.tensor([float("nan")]), torch.tensor([1.0]))
        nan
    """
    if not (one.is_floating_point() and two.is_floating_point()):
        return None
    worst = 0.0
    left, right = one.reshape(-1), two.reshape(-1)
    for start in range(0, left.numel(), _CHUNK):
        try:
            a, b = (side[start : start + _CHUNK].double() for side in (left, right))
        except NotImplementedError:  # numbers of four bits
            return None
        gap = (a - b).abs()
        gap[(a == b) | (a.isnan() & b.isnan())] = 0.0
        if gap.isnan().any():
            return math.nan
        worst = max(worst, float(gap.max()))
    return worst
