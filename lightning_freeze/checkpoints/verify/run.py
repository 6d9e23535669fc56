"""Files -> what was found: align their names, compare tensor by tensor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Union

from lightning_freeze.checkpoints.certificate import Certified, read_certificate
from lightning_freeze.checkpoints.verify.align import Alignment, align, check_stacks
from lightning_freeze.checkpoints.verify.certified import Promises, findings, promises
from lightning_freeze.checkpoints.verify.compare import converted, identical, largest_difference
from lightning_freeze.checkpoints.verify.groups import group_names, in_natural_order
from lightning_freeze.checkpoints.verify.result import (
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
    UNLIKE,
    Side,
    TensorResult,
    Verification,
)
from lightning_freeze.checkpoints.verify.spelling import printable
from lightning_freeze.checkpoints.verify.weights import Weights, open_weights
from lightning_freeze.errors import ArgumentError
from lightning_freeze.fingerprint import fingerprint
from lightning_freeze.model.index import some

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
        self.promises = Promises("", {}, {})
        if self.certificate is not None:
            self.promises = promises(self.certificate, right, prefix)
        self.fits: dict[str, bool] = {}

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
        certified = list(self.promises.entries)
        if self.checkpoint.in_model_order:
            return list(dict.fromkeys([*ours, *theirs, *certified]))
        if self.base is not None and self.base.in_model_order:
            return list(dict.fromkeys([*theirs, *in_natural_order(ours), *certified]))
        return in_natural_order({*ours, *theirs, *certified})

    def _tensor(self, name: str, group: str) -> TensorResult:
        old = self.in_base.get(name)
        before = self.base.specs[old] if self.base and old is not None else None
        after = self.checkpoint.specs.get(name)
        result = TensorResult(name, group, before, after, NOT_COMPARED)
        if self.base is not None and old is not None and before and after:
            result = _compare(result, self.base, old, self.checkpoint)
        elif before or (after and self.base):
            result = replace(result, status=ONLY_BASE if before else ONLY_CHECKPOINT)
        if name in self.promises.entries:
            return self._certified(result, self.promises.entries[name])
        return result

    def _certified(self, result: TensorResult, promise: Certified) -> TensorResult:
        if result.checkpoint is None:
            # one name of a tied tensor is enough: safetensors keeps no more
            others = self.promises.tied.get(result.name, ())
            held = any(self._fits(name) for name in others)
            return replace(result, certified=HELD if held else MISSING)
        if not self._fits(result.name):
            return replace(result, certified=BROKEN)
        renewed = promise.reinitialised and result.status in UNLIKE
        as_base = result.status == IDENTICAL or result.converted or renewed
        from_the_start = promise.step == 0 and result.base is not None
        mark = NOT_BASE if from_the_start and not as_base else HELD
        return replace(result, certified=mark, reinitialised=renewed)

    def _fits(self, name: str) -> bool:
        """Whether CHECKPOINT has a tensor, and it is as certified."""
        if name not in self.fits:
            promise, spec = self.promises.entries[name], self.checkpoint.specs.get(name)
            self.fits[name] = (
                spec is not None
                and (spec.dtype, spec.shape) == (promise.dtype, promise.shape)
                and fingerprint(self.checkpoint.load(name)) == promise.fingerprint
            )
        return self.fits[name]

    def _certificate_side(self) -> Side | None:
        if self.certificate is None:
            return None
        kind = f"made {printable(self.certificate.created)}"
        frozen = len(self.certificate.frozen)
        return Side(self.certificate_path, kind, frozen, self.promises.left)

    def _notes(self) -> list[str]:
        found = [] if self.certificate is None else findings(self.certificate)
        return [*self._ties(), *found]

    def _ties(self) -> list[str]:
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


def _compare(result: TensorResult, base: Weights, old: str, checkpoint: Weights) -> TensorResult:
    if base.specs[old].shape != checkpoint.specs[result.name].shape:
        return replace(result, status=OTHER_SHAPE)
    one, two = base.load(old), checkpoint.load(result.name)
    if identical(one, two):
        return replace(result, status=IDENTICAL)
    return replace(
        result,
        status=CHANGED if one.dtype == two.dtype else OTHER_DTYPE,
        difference=largest_difference(one, two),
        converted=converted(one, two),
    )


def _shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    return {name: spec.shape for name, spec in weights.specs.items()}


def _side(weights: Weights, prefix: str) -> Side:
    return Side(weights.path, weights.kind, len(weights.specs), prefix)
