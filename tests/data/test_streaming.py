"""A stream has every row once an epoch and resumes exactly where it was."""

import json

import datasets
import pytest
import torch
from datasets_on_disk import png, squares, write_parquet

from pipeline.config import DataConfig
from pipeline.data import sources
from pipeline.data.sources import rows as rows_module
from pipeline.data.sources.rows import DataError, Rows, Unreachable
from pipeline.data.sources.table import table_row
from pipeline.data.streaming import Stream


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """35 images whose red is their number, in five shards."""
    folder = tmp_path_factory.mktemp("table")
    for i in range(SHARDS):
        write_parquet(
            folder / f"train-{i:05d}-of-{SHARDS:05d}.parquet", squares(ROWS * i, ROWS * i + ROWS)
        )
    return folder


@pytest.fixture
def stream(table, tmp_path):
    """Streams of the table, closed after the test."""
    opened = []

    def call(source=table, seed=0, process=0, processes=1, **settings):
        settings = {
            "resolution": 4,
            "shuffle_buffer": 4,
            "streaming": True,
            "cache": str(tmp_path / "cache"),
        } | settings
        opened.append(Stream(DataConfig(str(source), **settings), seed, process, processes))
        return opened[-1]

    yield call
    for one in opened:
        one.close()


def take(stream, n):
    """The numbers of the next n images, which must be those of their captions."""
    batch = stream.take(n)
    assert batch.images.shape == (n, 3, 4, 4) and batch.images.dtype == torch.uint8
    reds = batch.images[:, 0, 0, 0].tolist()
    assert list(batch.alternatives) == [[f"square {i}"] for i in reds]
    return reds


def test_take_has_every_row_once_per_epoch_in_new_order(stream):
    epochs = [take(one, SHARDS * ROWS) for one in (stream(), stream(seed=1)) for _ in range(2)]
    assert all(sorted(epoch) == [*range(SHARDS * ROWS)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4 and epochs[0] != sorted(epochs[0])
    assert take(stream(), SHARDS * ROWS) == epochs[0], "a function of the seed"


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_stream_processes_share_an_epoch(stream, processes):
    """By shards where their number allows (5), else by rows (2, 3)."""
    shares = [
        [*range(i, SHARDS * ROWS, processes)] for i in range(processes)
    ]  # only their lengths matter
    taken = [
        take(stream(process=i, processes=processes), len(share)) for i, share in enumerate(shares)
    ]
    assert sorted(i for share in taken for i in share) == [*range(SHARDS * ROWS)]


@pytest.mark.parametrize(("process", "processes"), [(0, 1), (1, 2), (4, 5)])
@pytest.mark.parametrize("taken", [0, 3, 4, 9, 35, 50])
def test_load_state_dict_resumes_at_the_saved_example(stream, taken, process, processes):
    """In the middle of a block, at its end, and in the second epoch; the state is JSON."""
    whole = stream(process=process, processes=processes)
    for _ in range(taken):
        take(whole, 1)
    state = json.loads(json.dumps(whole.state_dict()))
    rest = take(whole, 40)
    fresh = stream(process=process, processes=processes)
    take(fresh, 2)
    fresh.load_state_dict(state)
    assert take(fresh, 40) == rest
    whole.load_state_dict(state)
    assert take(whole, 17) + take(whole, 23) == rest, "how many are taken at once does not matter"


def test_load_state_dict_refuses_another_process_state(stream):
    with pytest.raises(
        DataError, match="saved by process 0 of 1 and is read by process 0 of 2: go on with as many"
    ):
        stream(processes=2).load_state_dict(stream().state_dict())


def test_take_skips_logs_and_counts_broken_rows(stream, tmp_path, caplog):
    rows = squares(0, 6)
    rows[2]["image"], rows[4]["image"] = b"not a image", None
    one = stream(write_parquet(tmp_path / "some.parquet", rows), max_broken=0.5)
    assert sorted(take(one, 4)) == [0, 1, 3, 5] and sorted(take(one, 4)) == [0, 1, 3, 5]
    said = " ".join(record.getMessage() for record in caplog.records)
    assert (
        "skipped row 4: it has no image" in said
        and "skipped row 2: cannot identify it as a image" in said
    )
    state = one.state_dict()
    assert state["epoch"] == 1 and 8 < state["seen"] <= 12 and state["broken"] == state["seen"] - 8


def test_take_refuses_too_many_broken_rows(stream, tmp_path):
    rows = squares(0, 8)
    rows[3]["image"] = rows[5]["image"] = b"x"
    path = write_parquet(tmp_path / "some.parquet", rows)
    with pytest.raises(
        DataError,
        match=r"2 of the first \d rows of .* are broken, at most 1% may be, the last one row [35] \(",
    ):
        take(stream(path, max_broken=0.01), 32)
    one = stream(
        write_parquet(tmp_path / "none.parquet", [{"image": b"x", "text": "a"}]), max_broken=1
    )
    with pytest.raises(
        DataError,
        match="no usable row for process 0 of 1 in a whole epoch: 1 of 1 rows were broken",
    ):
        take(one, 1)
    with pytest.raises(DataError, match="no usable row"):
        take(one, 1)


def test_take_keeps_or_skips_rows_without_caption(stream, tmp_path):
    rows = squares(0, 3)
    rows[1]["text"] = None
    path = write_parquet(tmp_path / "some.parquet", rows)
    assert sorted(stream(path).take(3).alternatives) == [[""], ["square 0"], ["square 2"]]
    assert sorted(take(stream(path, missing_caption="skip", max_broken=0), 2)) == [0, 2]


def flaky(errors):
    """30 rows of a generator that raises one of the errors each time it comes to row 13."""

    def rows():
        for i in range(30):
            if i == 13 and errors:
                raise errors.pop(0)
            yield {"image": {"bytes": png(i), "path": None}, "text": f"square {i}"}

    features = datasets.Features(
        {"image": datasets.Image(decode=False), "text": datasets.Value("string")}
    )
    found = datasets.IterableDataset.from_generator(rows, features=features)
    read = lambda example, number: table_row(example, number, "image", ("text",))
    return lambda config, split: Rows(found, read, "flaky", "a flaky table")


def test_take_is_the_same_after_network_errors(stream, monkeypatch):
    monkeypatch.setattr(rows_module, "READ_WAITS", (0.01, 0.01))
    monkeypatch.setattr(sources, "open_rows", flaky([]))
    whole = take(stream(), 60)
    assert sorted(whole) == sorted([*range(30)] * 2)
    errors = [ConnectionError("reset"), TimeoutError("slow")]
    monkeypatch.setattr(sources, "open_rows", flaky(errors))
    assert take(stream(), 60) == whole and errors == []


@pytest.mark.parametrize(
    ("error", "says", "kind"),
    [
        (
            ConnectionError("reset by peer"),
            r"cannot read a flaky table in 3 attempts \(reset by peer\): run the same command again",
            Unreachable,
        ),
        (
            FileNotFoundError("shard 7 is gone"),
            "cannot read a flaky table: shard 7 is gone",
            DataError,
        ),
    ],
)
def test_take_fails_in_one_line_and_keeps_the_position(stream, monkeypatch, error, says, kind):
    monkeypatch.setattr(rows_module, "READ_WAITS", (0.01, 0.01))
    monkeypatch.setattr(sources, "open_rows", flaky([]))
    whole = take(stream(), 40)
    monkeypatch.setattr(sources, "open_rows", flaky([error] * 9))
    one = stream()
    with pytest.raises(DataError, match=says) as caught:
        take(one, 32)
    assert "\n" not in str(caught.value) and caught.type is kind
    monkeypatch.setattr(sources, "open_rows", flaky([]))
    mended = stream()
    mended.load_state_dict(one.state_dict())
    assert take(mended, 40) == whole


def test_close_ends_a_wait_for_the_network(stream, monkeypatch):
    monkeypatch.setattr(rows_module, "READ_WAITS", (600,))
    monkeypatch.setattr(sources, "open_rows", flaky([ConnectionError("reset")] * 9))
    one = stream(shuffle_buffer=30)
    one.coming = one.reader.submit(one.some, 1)
    one.close()
    with pytest.raises(DataError, match="is closed"):
        one.coming.result(timeout=10)
