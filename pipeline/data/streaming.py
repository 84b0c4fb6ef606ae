"""A stream of captioned images: a table that is read during training, too long to be prepared."""

import concurrent.futures
import functools
import itertools
import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torch import Tensor

from pipeline.config import DataConfig
from pipeline.data.dataset import REPORTED_ROWS
from pipeline.data.image_ops import decoder_pool, prepare_row
from pipeline.data.sources import open_rows
from pipeline.data.sources.rows import (
    DataError,
    identity_row,
    retry_on_network_error,
    with_image_bytes,
)
from pipeline.randomness import generator

# Examples that are decoded while the network computes; at least one batch.
READ_AHEAD = 32
STREAM_DECODERS = 4
# Rows before the share of broken ones is meaningful.
MIN_ROWS_FOR_SHARE = 100

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamPosition:
    """Position in a stream: before row `position` of a shuffled block, and the rows so far.

    `source` is the state of the IterableDataset at the block's start, None at an epoch's start.
    """

    epoch: int = 0
    block: int = 0
    position: int = 0
    source: dict | None = None
    seen: int = 0
    broken: int = 0
    used: int = 0
    """usable rows in this epoch"""


@dataclass(frozen=True)
class StreamBatch:
    """Pixels (B, 3, H, W) uint8 with the captions of each image."""

    images: Tensor
    alternatives: Sequence[Sequence[str]]


Example = tuple[np.ndarray, list[str], StreamPosition]


class Stream:
    """The endless examples of one process: `take(n)` returns the next n.

    - Each epoch reads the shards in a new order and shuffles blocks of `shuffle_buffer` rows, both
      as functions of (seed, epoch, block).
    - Processes share an epoch (`split_dataset_by_node`): by shards if their number allows, else by
      rows. None waits for another; the one with the fewest rows starts its next epoch first.
    - The examples are a function of (data, seed, process, number of processes).
      `load_state_dict(state_dict())` continues with exactly the next ones, whatever was read ahead.
      Shuffling whole blocks, unlike the shuffle buffer of IterableDataset, loses none. It reads the
      rows before them in their shard again.
    - Unusable rows are logged, counted and replaced by the next. More than `max_broken` of them are
      a DataError, and so is an epoch without a usable row.
    - Network errors are retried from the start of the block, then become a DataError.
    """

    def __init__(self, config: DataConfig, seed: int, process: int = 0, processes: int = 1) -> None:
        self.config = config
        self.seed = seed
        self.process = process
        self.processes = processes
        self.rows = open_rows(config, config.split)
        # Shuffles the shards only; `read` shuffles the rows.
        shards = self.rows.table.shuffle(seed=seed, buffer_size=1, max_buffer_input_shards=1)
        self.dataset = split_dataset_by_node(shards, process, processes)
        self.closed = threading.Event()
        self.reader = concurrent.futures.ThreadPoolExecutor(1, "stream")
        self.decoders = decoder_pool(STREAM_DECODERS)
        self.seek(StreamPosition())

    def seek(self, place: StreamPosition) -> None:
        """Continue from a position."""
        self.place = place
        self.ready: deque[Example] = deque()
        self.pending: concurrent.futures.Future[list[Example]] | None = None
        self.examples = self.read(place)

    def take(self, n: int) -> StreamBatch:
        """Return the next n examples; DataError if they cannot be read."""
        while len(self.ready) < n:
            self.pending = self.pending or self.reader.submit(self.read_ahead, n)
            self.ready.extend(self.pending.result())
            self.pending = self.reader.submit(self.read_ahead, n)
        batch = [self.ready.popleft() for _ in range(n)]
        images, alternatives, places = zip(*batch, strict=True)
        self.place = places[-1]
        return StreamBatch(torch.from_numpy(np.stack(images)), alternatives)

    def state_dict(self) -> dict:
        """Return the position after the last example taken, as plain values."""
        return asdict(self.place) | {"process": self.process, "processes": self.processes}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a saved position; DataError if another process saved it."""
        state = dict(state)
        saved_by = (state.pop("process"), state.pop("processes"))
        if saved_by != (self.process, self.processes):
            raise DataError(
                f"Process {saved_by[0]} of {saved_by[1]} saved this stream, but process "
                f"{self.process} of {self.processes} reads it. Resume with {saved_by[1]} processes."
            )
        if self.pending is not None:
            concurrent.futures.wait([self.pending])
        self.seek(StreamPosition(**state))

    def close(self) -> None:
        """Stop reading ahead, even while waiting for the network."""
        self.closed.set()
        self.reader.shutdown(cancel_futures=True)
        self.decoders.shutdown()

    # What follows runs in the reader's thread.

    def read_ahead(self, n: int) -> list[Example]:
        """Return the next n examples, at least READ_AHEAD, each with the position after it."""
        return list(itertools.islice(self.examples, max(READ_AHEAD, n)))

    def read(self, place: StreamPosition) -> Iterator[Example]:
        """Yield the usable rows from a position on, decoded, each with the position after it."""
        shape = (3, self.config.resolution, self.config.resolution)
        self.iterator = None
        while True:
            read_block = functools.partial(self.read_block, place)
            rows = retry_on_network_error(read_block, self.rows.name, self.closed.wait)
            mixed = generator(self.seed, place.epoch, place.block, "mixed")
            order = torch.randperm(len(rows), generator=mixed).tolist()
            for row in self.decode([rows[i] for i in order[place.position :]]):
                broken = bool(row["problem"])
                skipped = not row["captions"] and self.config.missing_caption == "skip"
                usable = not broken and not skipped
                place = replace(
                    place,
                    position=place.position + 1,
                    seen=place.seen + 1,
                    used=place.used + usable,
                    broken=place.broken + broken,
                )
                if broken:
                    self.report_broken(row, place)
                if usable:
                    pixels = np.frombuffer(row["pixels"], np.uint8).reshape(shape)
                    yield pixels, row["captions"] or [""], place
            place = self.next_block(place, len(rows))

    def decode(self, rows: list[dict]) -> Iterator[dict]:
        """Yield prepared rows, READ_AHEAD decoded at a time."""
        prepare = functools.partial(
            prepare_row,
            number=0,
            read=identity_row,
            resolution=self.config.resolution,
            crop=self.config.crop,
        )
        for start in range(0, len(rows), READ_AHEAD):
            yield from self.decoders.map(prepare, rows[start : start + READ_AHEAD])

    def next_block(self, place: StreamPosition, rows: int) -> StreamPosition:
        """Return the position after a block; DataError if no row of an epoch was usable."""
        if rows == self.config.shuffle_buffer:
            source = self.dataset.state_dict()
            return replace(place, block=place.block + 1, position=0, source=source)
        if place.used:
            return StreamPosition(place.epoch + 1, seen=place.seen, broken=place.broken)
        raise DataError(
            f"{self.rows.name} has no usable row for process {self.process} of {self.processes}: "
            f"{place.broken} of {place.seen} rows were broken in a whole epoch. Repair the data."
        )

    def read_block(self, place: StreamPosition) -> list[dict]:
        """Return the rows of a position's block: `shuffle_buffer`, or fewer at an epoch's end."""
        self.require_open()
        if self.iterator is None:
            self.dataset.set_epoch(place.epoch)
            self.dataset.load_state_dict(place.source)
            self.iterator = iter(self.dataset)
        # An iterator that fails is not used again.
        iterator = self.iterator
        self.iterator = None
        size = self.config.shuffle_buffer
        first = place.block * size
        rows = []
        for number, example in enumerate(itertools.islice(iterator, size), first):
            self.require_open()
            rows.append(with_image_bytes(self.rows.read(example, number)))
        if len(rows) == size:
            self.iterator = iterator
        return rows

    def require_open(self) -> None:
        """Raise DataError for a closed stream, which ends its retries."""
        if self.closed.is_set():
            raise DataError(f"{self.rows.name} is closed.")

    def report_broken(self, row: dict, place: StreamPosition) -> None:
        """Log one of the first broken rows; DataError if there are too many."""
        if place.broken <= REPORTED_ROWS:
            logger.warning("%s: skipped %s: %s", self.rows.name, row["name"], row["problem"])
        if place.broken > self.config.max_broken * max(place.seen, MIN_ROWS_FOR_SHARE):
            raise DataError(
                f"{place.broken} of the first {place.seen} rows of {self.rows.name} are broken, "
                f"most recently {row['name']} ({row['problem']}), more than data.max_broken "
                f"allows ({self.config.max_broken:.0%}). Repair the data or raise data.max_broken."
            )
