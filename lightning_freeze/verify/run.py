"""Files -> what was found: align their names, compare tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Union

from lightning_freeze.certificate import Certificate, Certified, read_certificate
from lightning_freeze.errors import ArgumentError, VerifyError
from lightning_freeze.fingerprint import fingerprint
from lightning_freeze.names import some
from lightning_freeze.verify.align import Alignment, Shapes, align, check_stacks, tidy
from lightning_freeze.verify.compare import identical, largest_difference
from lightning_freeze.verify.groups import group_names, in_natural_order
from lightning_freeze.verify.result import (
    BROKEN,
    CHANGED,
    HELD,
    IDENTICAL,
    MISSING,
    NOT_BASE,
    NOT_COMPARED,
    ONLY_BASE,
    ONLY_CHECKPOINT,
    OTHER_DTYPE,
    OTHER_SHAPE,
    Side,
    TensorResult,
    Verification,
)
from lightning_freeze.verify.weights import Weights, open_weights

_File = Union[str, Path]


def verify(
    base: _File | None,
    checkpoint: _File,
    certificate: _File | None = None,
    prefix: str | None = None,
) -> Verification:
    """Compare the weights of two files, or of one with a certificate, to the bit.

    Args:
        base: what the run began with.
        checkpoint: what is to be verified.
        certificate: what says which tensors were frozen, and with which bytes; may be the
            checkpoint itself.
        prefix: where the common part begins, in whichever file holds it several times.

    Raises:
        VerifyError: a file can't be read or is refused, or they are of different models.
        ArgumentError: there is nothing to compare with.
    """
    if base is None and certificate is None:
        raise ArgumentError(
            f"There is nothing to compare `{checkpoint}` with. Give two files, or one file and "
            "`--certificate FILE`, which may be the checkpoint itself."
        )
    return _Run(base, checkpoint, certificate, prefix).result()


class _Run:
    """One verification; everything is called by its name in CHECKPOINT."""

    def __init__(
        self,
        base: _File | None,
        checkpoint: _File,
        certificate: _File | None,
        prefix: str | None,
    ) -> None:
        self.base = None if base is None else open_weights(base)
        self.checkpoint = open_weights(checkpoint)
        self.certificate = None if certificate is None else read_certificate(certificate)
        self.certificate_path = str(certificate)
        right = _shapes(self.checkpoint)
        self.in_base: dict[str, str] = {}
        self.base_at: Alignment | None = None
        if self.base is not None:
            left = _shapes(self.base)
            self.base_at = align(left, right, prefix)
            check_stacks(self.base_at, left, right)
            self.in_base = {new: old for old, new in self.base_at.names.items()}
        self.certified: dict[str, Certified] = {}
        self.certificate_at: Alignment | None = None
        if self.certificate is not None:
            self.certificate_at, self.certified = _place(self.certificate, right, prefix)

    def result(self) -> Verification:
        """Compare all, one tensor after the other."""
        names = self._names()
        groups = group_names(names)
        at = self.base_at or Alignment("", "", {})
        return Verification(
            base=None if self.base is None else _side(self.base, at.left),
            checkpoint=_side(self.checkpoint, at.right),
            tensors=tuple(self._tensor(name, groups[name]) for name in names),
            certificate=self.certificate,
            certificate_side=self._certificate_side(),
            notes=tuple(self._notes()),
        )

    def _names(self) -> list[str]:
        """All names, in the order of whichever file has that of the model."""
        ours, theirs = list(self.checkpoint.specs), list(self.in_base)
        certified = list(self.certified)
        if self.checkpoint.in_model_order:
            return list(dict.fromkeys([*ours, *theirs, *certified]))
        if self.base is not None and self.base.in_model_order:
            return list(dict.fromkeys([*theirs, *in_natural_order(ours), *certified]))
        return in_natural_order({*ours, *theirs, *certified})

    def _tensor(self, name: str, group: str) -> TensorResult:
        old = self.in_base.get(name)
        before = self.base.specs[old] if self.base and old is not None else None
        after = self.checkpoint.specs.get(name)
        status, difference = NOT_COMPARED, None
        if self.base is not None:
            status = ONLY_CHECKPOINT if before is None else ONLY_BASE
            if before is not None and after is not None and old is not None:
                status, difference = _compare(self.base, old, self.checkpoint, name)
            elif before is None and after is None:
                status = NOT_COMPARED
        certified = self._certified(name, status) if name in self.certified else ""
        return TensorResult(name, group, before, after, status, difference, certified)

    def _certified(self, name: str, status: str) -> str:
        promise = self.certified[name]
        spec = self.checkpoint.specs.get(name)
        if spec is None:
            return MISSING
        if (spec.dtype, spec.shape) != (promise.dtype, promise.shape):
            return BROKEN
        if fingerprint(self.checkpoint.load(name)) != promise.fingerprint:
            return BROKEN
        from_the_start = promise.step == 0 and name in self.in_base
        return NOT_BASE if from_the_start and status != IDENTICAL else HELD

    def _certificate_side(self) -> Side | None:
        if self.certificate is None or self.certificate_at is None:
            return None
        kind = f"made {self.certificate.created}"
        left = self.certificate_at.left
        return Side(self.certificate_path, kind, len(self.certificate.frozen), left)

    def _notes(self) -> list[str]:
        """Why a name may be missing: safetensors keeps a tied tensor under one of its names."""
        if self.base is None or self.base_at is None:
            return []
        new = self.base_at.names
        ours, theirs = self.checkpoint.specs, self.in_base
        there = [(a, b) for a, b in self.checkpoint.tied.items() if a not in theirs and b in theirs]
        here = [(new[a], new[b]) for a, b in self.base.tied.items()]
        here = [(a, b) for a, b in here if a not in ours and b in ours]
        return [
            f"one tensor in {side}: {some([f'{a} = {b}' for a, b in pairs], most=2)}"
            for side, pairs in (("BASE", here), ("CHECKPOINT", there))
            if pairs
        ]


def _compare(base: Weights, old: str, checkpoint: Weights, name: str) -> tuple[str, float | None]:
    before, after = base.specs[old], checkpoint.specs[name]
    if before.shape != after.shape:
        return OTHER_SHAPE, None
    one, two = base.load(old), checkpoint.load(name)
    if identical(one, two):
        return IDENTICAL, None
    return CHANGED if before.dtype == after.dtype else OTHER_DTYPE, largest_difference(one, two)


def _place(
    certificate: Certificate, right: Shapes, prefix: str | None
) -> tuple[Alignment, dict[str, Certified]]:
    """What a certificate says, by the names of CHECKPOINT."""
    if not certificate.frozen:
        raise VerifyError(
            "The certificate certifies no tensor: nothing was frozen when it was written. Compare "
            "with the weights that the run began with instead: `verify BASE CHECKPOINT`."
        )
    short = tidy(certificate.frozen)
    frozen: Mapping[str, Certified] = {short[n]: entry for n, entry in certificate.frozen.items()}
    shapes = {name: entry.shape for name, entry in frozen.items()}
    sides = ("The certificate", "CHECKPOINT")
    try:
        found = align(shapes, right, None, sides)
    except VerifyError:
        # a prefix says where BASE stands; here it only decides what is open
        if prefix is None:
            raise
        found = align(shapes, right, prefix, sides)
    return found, {found.names[name]: entry for name, entry in frozen.items()}


def _shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    return {name: spec.shape for name, spec in weights.specs.items()}


def _side(weights: Weights, prefix: str) -> Side:
    return Side(weights.path, weights.kind, len(weights.specs), prefix)
