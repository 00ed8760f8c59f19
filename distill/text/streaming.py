"""Training sequences from a source that is never held: read, tokenized and cut as training goes on."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from typing import Any

import numpy as np
from torch import Tensor

from neural_layers.distill.text.errors import TextError
from neural_layers.distill.text.feed import BatchPlan
from neural_layers.distill.text.mixing import Mixture
from neural_layers.distill.text.packing import Packed, pack
from neural_layers.distill.text.reading import ReadingOptions
from neural_layers.distill.text.sampling import check_length, collate
from neural_layers.distill.text.sources import Source
from neural_layers.distill.text.store import tokens_of

WINDOW = 256


@dataclass(frozen=True)
class Place:
    """Where a source is read: enough to begin again there without tokenizing what lies before.

    epoch, part, piece, token: the pass over the source, the part in the pass's order, the piece in the part, the token
                               in the piece
    """

    epoch: int = 0
    part: int = 0
    piece: int = 0
    token: int = 0


class SourceStream:
    """The sequences of one source, without end; the same for the same seed.

    The parts come in a new order every epoch, and within each window of 256 sequences their order is drawn, so that no
    more than these are held. A sequence may reach over the end of a part into the next.

    source, tokenizer, reading: what is read, and how. context: tokens of a sequence. number: of the source, for its
    random order
    """

    def __init__(
        self, source: Source, tokenizer: Any, reading: ReadingOptions, context: int, seed: int, number: int = 0
    ) -> None:
        self.source, self.tokenizer, self.reading = source, tokenizer, reading
        self.context, self.seed, self.number = context, seed, number
        self._start, self._window, self._taken = Place(), 0, 0
        self._sequences = self._shuffled()

    def __next__(self) -> Packed:
        return next(self._sequences)

    def check(self) -> None:
        """Read the first sequence, so that what is wrong with the text is told before training begins."""
        next(_Cutter(self, Place()))

    def state(self) -> dict[str, Any]:
        """Where the current window begins, its number, and how many sequences of it were given out."""
        return {"place": asdict(self._start), "window": self._window, "taken": self._taken}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on behind the last sequence that was given out when `state` was called."""
        self._start, self._window, self._taken = Place(**state["place"]), state["window"], state["taken"]
        self._sequences = self._shuffled()

    def _shuffled(self) -> Iterator[Packed]:
        while True:
            sequences = _Cutter(self, self._start)
            window = list(islice(sequences, WINDOW))
            order = np.random.default_rng([self.seed, self.number, self._window]).permutation(len(window))
            for chosen in order[self._taken :]:
                self._taken += 1
                yield window[chosen]
            self._start, self._window, self._taken = sequences.place, self._window + 1, 0

    def pieces(self, place: Place) -> Iterator[tuple[Place, bool, list[int]]]:
        """From `place` on, without end: the place of each piece, whether a document begins with it, and its tokens."""
        parts, epoch, first, skipped = self.source.parts, place.epoch, place.part, place.piece
        while True:
            found = 0
            order = np.random.default_rng([self.seed, self.number, epoch, 1]).permutation(len(parts))
            for position in range(first, len(parts)):
                pieces = islice(parts[order[position]].read(self.reading, streaming=True), skipped, None)
                for number, (piece, ids) in enumerate(tokens_of(pieces, self.tokenizer), start=skipped):
                    found += len(ids)
                    yield Place(epoch, position, number), piece.begins, ids
                skipped = 0
            if not found and not first and not place.piece:
                raise TextError(f"{self.source.name}: no text in it; give data that is not empty")
            if first == 0 and place.piece == 0 and epoch == 0:
                check_length(found, self.context, self.source.name)
            epoch, first, place = epoch + 1, 0, Place(epoch + 1)


class _Cutter:
    """Cuts the pieces of a stream into sequences and knows the place behind the last one."""

    def __init__(self, stream: SourceStream, place: Place) -> None:
        self.place = place
        self._context, self._pieces = stream.context, stream.pieces(place)
        self._tokens: list[int] = []
        self._starts: list[int] = []
        self._at: list[tuple[int, Place]] = []  # where in `_tokens` each piece begins
        self._skip = place.token

    def __iter__(self) -> Iterator[Packed]:
        return self

    def __next__(self) -> Packed:
        while len(self._tokens) <= self._context:
            place, begins, ids = next(self._pieces)
            if begins and not self._skip:
                self._starts.append(len(self._tokens))
            self._at.append((len(self._tokens), replace(place, token=self._skip)))
            self._tokens += ids[self._skip :]
            self._skip = 0
        cut = self._context
        packed = pack(np.array(self._tokens[:cut]), np.array([s for s in self._starts if s < cut], dtype=np.int64))
        offset, place = next((o, p) for o, p in reversed(self._at) if o <= cut)
        self.place = replace(place, token=place.token + cut - offset)
        self._at = [(o - cut, p) for o, p in self._at if o > cut]
        self._at.insert(0, (0, self.place))
        self._starts = [s - cut for s in self._starts if s >= cut]
        self._tokens = self._tokens[cut:]
        return packed


class StreamedFeed:
    """Batches of several streamed sources mixed by weight; `state` holds where each is read.

    Every process reads all sources and takes its own sequences of each batch.
    Raises: InputError for weights that do not fit; TextError while reading, where a text is broken or too short.
    """

    def __init__(self, streams: Sequence[SourceStream], weights: Sequence[float], plan: BatchPlan, seed: int) -> None:
        self.streams, self.plan, self.mixture = streams, plan, Mixture(weights, seed)

    def batches(self, step: int) -> Iterator[dict[str, Tensor]]:
        """This process's batches from optimiser step `step` on, where `restore` has led."""
        for first in count(step * self.plan.step, self.plan.batch):
            indices = range(first, first + self.plan.batch)
            sequences = [next(self.streams[self.mixture.place(index)[0]]) for index in indices]
            yield collate([s for index, s in zip(indices, sequences, strict=True) if self.plan.is_mine(index)])

    def state(self) -> dict[str, Any]:
        """The places of all streams."""
        return {"streams": [stream.state() for stream in self.streams]}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from the places that `state` told."""
        for stream, place in zip(self.streams, state["streams"], strict=True):
            stream.restore(place)
