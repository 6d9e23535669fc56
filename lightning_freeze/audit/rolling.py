"""A full comparison spread over many steps: each looks at a slice that its time allows."""

from __future__ import annotations

from time import perf_counter

from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_freeze.audit.baseline import Baseline
from lightning_freeze.digests import CHUNK, chunk_digest, chunks, dense, joined

# so many small tensors are compared at a time
_BATCH = 32


class Pace:
    """How much time looking may take: it earns a share of each step, and spends what it measures.

    Attributes:
        share: of a step's time.

    Example:
        >>> pace = Pace(0.01)
        >>> pace.step(2.0)
        >>> pace.credit
        0.02
        >>> pace.spend(0.015)
        >>> round(pace.credit, 3)
        0.005
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.credit = 0.0
        self._usual = 0.0

    def step(self, seconds: float) -> None:
        """Another step has gone by.

        One that was held up, by data or a checkpoint, earns no more than two usual ones, and what
        isn't used isn't saved for more than a hundred steps.
        """
        seconds = min(seconds, 2 * self._usual or seconds)
        self._usual += 0.1 * (seconds - self._usual) if self._usual else seconds
        earned = self.share * seconds
        self.credit = min(self.credit + earned, max(100 * earned, self.credit))

    def spend(self, seconds: float) -> None:
        """Looking has taken so long."""
        self.credit -= seconds


class Rolling:
    """Goes round a baseline, slice by slice.

    Attributes:
        steps_per_round: how many steps the last full round took; 0 before the first has ended.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2).requires_grad_(False)
        >>> rolling = Rolling(Baseline.of(list(model.named_parameters()), (0, 0)))
        >>> rolling.advance(seconds=1.0)
        []
        >>> rolling.steps_per_round
        1
        >>> _ = model.bias.data.add_(1)
        >>> rolling.advance(seconds=1.0)
        [1]
    """

    def __init__(self, baseline: Baseline) -> None:
        self.steps_per_round = 0
        self._steps = 0
        self._done = 0
        self._per_byte = 1e-10
        self._per_piece = 2e-5
        self.begin(baseline)

    def begin(self, baseline: Baseline) -> None:
        """Go on with another baseline, from its beginning."""
        self._baseline = baseline
        self._done = 0
        self._position = 0
        self._chunk = 0

    @property
    def expected_round(self) -> int:
        """Steps that a round takes, told from what has been compared so far if none has ended."""
        if self.steps_per_round or not self._done:
            return self.steps_per_round
        whole = sum(self._size(position) for position in range(len(self._baseline)))
        return max(1, round(self._steps * whole / self._done))

    def advance(self, seconds: float) -> list[int]:
        """Compare the next slice.

        Args:
            seconds: how long that may take; nothing is compared where that is too short.

        Returns:
            Positions of the tensors that have changed.
        """
        self._steps += 1
        found: list[int] = []
        left = seconds
        looked = 0
        while looked < len(self._baseline) and self._expected() <= left:
            begun = perf_counter()
            before = self._position
            size, changed = self._piece()
            took = perf_counter() - begun
            left -= took
            self._done += size
            found += changed
            looked += self._position - before
            if size >= CHUNK // 2:
                self._per_byte += 0.2 * (took / size - self._per_byte)
            else:
                self._per_piece += 0.2 * (took - self._per_piece)
            if self._position >= len(self._baseline):
                self._position = self._done = 0
                self.steps_per_round, self._steps = self._steps, 0
                break
        return found

    def _expected(self) -> float:
        return max(self._per_piece, self._per_byte * min(self._size(self._position), CHUNK))

    def _size(self, position: int) -> int:
        tensor = self._baseline.tensor(position)
        return 0 if tensor is None or is_lazy(tensor) else tensor.nbytes

    def _piece(self) -> tuple[int, list[int]]:
        """Compare one chunk of a large tensor, or some small ones; move on behind them."""
        first = self._position
        tensor = self._baseline.tensor(first)
        if tensor is not None and self._baseline.part(first, 0) is not None:
            return self._one_chunk(first, tensor)
        last, size = first, 0
        while last < len(self._baseline) and last - first < _BATCH and size < CHUNK // 4:
            if self._baseline.part(last, 0) is not None:
                break
            size += self._size(last)
            last += 1
        self._position = last
        return size, self._baseline.changed(range(first, last))

    def _one_chunk(self, position: int, tensor: Tensor) -> tuple[int, list[int]]:
        flat = dense(tensor, lambda: self._baseline.names[position])
        if isinstance(flat, bytes) or flat.data_ptr() != self._baseline.address(position):
            # not the memory that was taken down, so that a chunk of it says nothing
            self._position, self._chunk = position + 1, 0
            return tensor.nbytes, self._baseline.changed([position])
        known = self._baseline.part(position, self._chunk)
        changed = [position] if chunk_digest(flat, self._chunk) != known else []
        size = min(CHUNK, flat.nbytes - self._chunk * CHUNK)
        self._chunk += 1
        if self._chunk >= chunks(flat.nbytes):
            if joined(flat, self._baseline.parts(position)) != self._baseline.digest(position):
                changed = [position]  # the same bytes in another shape or dtype
            self._position, self._chunk = position + 1, 0
        return size, changed
