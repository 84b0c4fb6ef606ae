"""A stream of captioned images: a table that is read while a network trains on it, too long to be prepared before."""

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

READ_AHEAD = 32  # examples that are decoded while the network computes, and no fewer than a batch
STREAM_DECODERS = 4  # threads
MIN_ROWS_FOR_SHARE = 100  # rows before a share of broken ones means anything

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamPosition:
    """Where a stream is: before row `position` of a block, as it is mixed; `source` is where the block begins."""

    epoch: int = 0
    block: int = 0
    position: int = 0
    source: dict | None = None  # IterableDataset.state_dict(), None at an epoch's beginning
    seen: int = 0
    broken: int = 0
    used: int = 0  # in this epoch


@dataclass(frozen=True)
class StreamBatch:
    """Pixels (B, 3, H, W) uint8, with the captions of each."""

    images: Tensor
    alternatives: Sequence[Sequence[str]]


class Stream:
    """The examples of one process, without end: `take(n)` gives the next n.

    What is promised:

    - Each epoch reads the shards in an order of its own and mixes `shuffle_buffer` rows at a time, by (seed, epoch, block).
    - The processes share an epoch (`split_dataset_by_node`): each has shards of its own where their number allows, else one
      row in so many. None waits for another; the one with the fewest rows begins its next epoch first.
    - The examples are a function of (data, seed, process, number of processes). `load_state_dict(state_dict())` gives just
      those that would have come next, whatever was read ahead: mixing whole blocks, unlike IterableDataset's shuffle
      buffer, loses none. It reads anew what lies before them in their shard.
    - A row that cannot be used is logged and counted, and the next one takes its place. More than a share `max_broken` of
      them is a DataError, and so is an epoch without one usable row.
    - A network that fails is asked again (`sources.retried`), from the beginning of the block; then it is a DataError.
    """

    def __init__(self, config: DataConfig, seed: int, process: int = 0, processes: int = 1):
        rows = open_rows(config, config.split)
        shards = rows.table.shuffle(
            seed=seed, buffer_size=1, max_buffer_input_shards=1
        )  # their order; the rows: `mixed`
        self.dataset = split_dataset_by_node(shards, process, processes)
        self.config, self.seed, self.process, self.processes, self.rows = (
            config,
            seed,
            process,
            processes,
            rows,
        )
        self.closed = threading.Event()
        self.reader = concurrent.futures.ThreadPoolExecutor(1, "stream")
        self.decoders = decoder_pool(STREAM_DECODERS)
        self.begin(StreamPosition())

    def begin(self, place: StreamPosition) -> None:
        """Go on from a place."""
        self.place, self.ready, self.coming = place, deque(), None
        self.examples = self.read(place)

    def take(self, n: int) -> StreamBatch:
        """The next n examples; DataError where there are none to be had."""
        while len(self.ready) < n:
            self.coming = self.coming or self.reader.submit(self.some, n)
            self.ready.extend(self.coming.result())
            self.coming = self.reader.submit(self.some, n)
        images, alternatives, places = zip(*(self.ready.popleft() for _ in range(n)), strict=True)
        self.place = places[-1]
        return StreamBatch(torch.from_numpy(np.stack(images)), alternatives)

    def state_dict(self) -> dict:
        """Where this process is, after the last example that was taken: plain values."""
        return asdict(self.place) | {"process": self.process, "processes": self.processes}

    def load_state_dict(self, state: dict) -> None:
        """Go on after the example that was the last one taken; DataError for another process's state."""
        state = dict(state)
        saved, mine = (state.pop("process"), state.pop("processes")), (self.process, self.processes)
        if saved != mine:
            raise DataError(
                f"the stream was saved by process {saved[0]} of {saved[1]} and is read by process {mine[0]} of "
                f"{mine[1]}: go on with as many processes as before"
            )
        if self.coming is not None:
            concurrent.futures.wait([self.coming])
        self.begin(StreamPosition(**state))

    def close(self) -> None:
        """Stop reading ahead, also where the network is being waited for."""
        self.closed.set()
        self.reader.shutdown(cancel_futures=True)
        self.decoders.shutdown()

    # -- in the reader's thread

    def some(self, n: int) -> list[tuple[np.ndarray, list[str], StreamPosition]]:
        """The next n examples, AHEAD at the least, each with the place after it."""
        return list(itertools.islice(self.examples, max(READ_AHEAD, n)))

    def read(self, place: StreamPosition) -> Iterator[tuple[np.ndarray, list[str], StreamPosition]]:
        """The usable rows from a place on, decoded, each with the place after it."""
        size, shape = (
            self.config.shuffle_buffer,
            (3, self.config.resolution, self.config.resolution),
        )
        decode = functools.partial(
            prepare_row,
            number=0,
            read=identity_row,
            resolution=self.config.resolution,
            crop=self.config.crop,
        )
        self.iterator = None
        while True:
            rows = retry_on_network_error(
                functools.partial(self.block, place), self.rows.name, self.closed.wait
            )
            mixed = torch.randperm(
                len(rows),
                generator=generator(self.seed, place.epoch, place.block, "mixed"),
            )
            for some in mixed[place.position :].split(READ_AHEAD):
                for row in self.decoders.map(decode, [rows[i] for i in some.tolist()]):
                    usable = not row["problem"] and (
                        row["captions"] or self.config.missing_caption == "empty"
                    )
                    place = replace(
                        place,
                        position=place.position + 1,
                        seen=place.seen + 1,
                        used=place.used + bool(usable),
                        broken=place.broken + bool(row["problem"]),
                    )
                    if row["problem"]:
                        self.skipped(row, place)
                    if usable:
                        yield (
                            np.frombuffer(row["pixels"], np.uint8).reshape(shape),
                            row["captions"] or [""],
                            place,
                        )
            if len(rows) == size:
                place = replace(
                    place, block=place.block + 1, position=0, source=self.dataset.state_dict()
                )
            elif place.used:
                place = StreamPosition(place.epoch + 1, seen=place.seen, broken=place.broken)
            else:
                raise DataError(
                    f"{self.rows.name} has no usable row for process {self.process} of {self.processes} in a whole "
                    f"epoch: {place.broken} of {place.seen} rows were broken"
                )

    def block(self, place: StreamPosition) -> list[dict]:
        """The rows of the block that begins at a place, all of them read; fewer than `shuffle_buffer` at an epoch's end."""
        if self.closed.is_set():
            raise DataError(f"{self.rows.name} is closed")
        if self.iterator is None:
            self.dataset.set_epoch(place.epoch)
            self.dataset.load_state_dict(place.source)
            self.iterator = iter(self.dataset)
        iterator, self.iterator = self.iterator, None  # one that fails is not used again
        size, before = self.config.shuffle_buffer, place.block * self.config.shuffle_buffer
        rows = []
        for i, example in enumerate(itertools.islice(iterator, size)):
            if self.closed.is_set():
                raise DataError(f"{self.rows.name} is closed")
            rows.append(with_image_bytes(self.rows.read(example, before + i)))
        self.iterator = iterator if len(rows) == size else None
        return rows

    def skipped(self, row: dict, place: StreamPosition) -> None:
        """Log one of the first broken rows; DataError where there are too many."""
        if place.broken <= REPORTED_ROWS:
            logger.warning("%s: skipped %s: %s", self.rows.name, row["name"], row["problem"])
        if place.broken > self.config.max_broken * max(place.seen, MIN_ROWS_FOR_SHARE):
            raise DataError(
                f"{place.broken} of the first {place.seen} rows of {self.rows.name} are broken, at most "
                f"{self.config.max_broken:.0%} may be, the last one {row['name']} ({row['problem']}): repair the "
                "data, or raise data.max_broken"
            )
