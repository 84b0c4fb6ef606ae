"""A stream gives every row once an epoch, to one process or shared by several, and goes on exactly where it was."""

import json

import datasets
import pytest
import torch
from test_sources import png, squares, write

from pipeline import sources
from pipeline.config import DataConfig
from pipeline.sources import DataError
from pipeline.stream import Stream

SHARDS, ROWS = 5, 7


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """35 pictures whose red is their number, in five shards."""
    folder = tmp_path_factory.mktemp("table")
    for i in range(SHARDS):
        write(folder / f"train-{i:05d}-of-{SHARDS:05d}.parquet", squares(ROWS * i, ROWS * i + ROWS))
    return folder


@pytest.fixture
def stream(table, tmp_path):
    """Streams of the table, closed after the test."""
    opened = []

    def call(source=table, seed=0, process=0, processes=1, **settings):
        settings = {"resolution": 4, "shuffle_buffer": 4, "streaming": True, "cache": str(tmp_path / "cache")} | settings
        opened.append(Stream(DataConfig(str(source), **settings), seed, process, processes))
        return opened[-1]

    yield call
    for one in opened:
        one.close()


def take(stream, n):
    """The numbers of the next n pictures, which must be those of their captions."""
    batch = stream.take(n)
    assert batch.images.shape == (n, 3, 4, 4) and batch.images.dtype == torch.uint8
    reds = batch.images[:, 0, 0, 0].tolist()
    assert list(batch.alternatives) == [[f"square {i}"] for i in reds]
    return reds


def test_every_epoch_has_every_row_once_in_an_order_of_its_own(stream):
    epochs = [take(one, SHARDS * ROWS) for one in (stream(), stream(seed=1)) for _ in range(2)]
    assert all(sorted(epoch) == [*range(SHARDS * ROWS)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4 and epochs[0] != sorted(epochs[0])
    assert take(stream(), SHARDS * ROWS) == epochs[0], "a function of the seed"


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_processes_share_an_epoch(stream, processes):
    """By shards where their number allows (5), else by rows (2, 3)."""
    shares = [[*range(i, SHARDS * ROWS, processes)] for i in range(processes)]  # only their lengths matter
    taken = [take(stream(process=i, processes=processes), len(share)) for i, share in enumerate(shares)]
    assert sorted(i for share in taken for i in share) == [*range(SHARDS * ROWS)]


@pytest.mark.parametrize(("process", "processes"), [(0, 1), (1, 2), (4, 5)])
@pytest.mark.parametrize("taken", [0, 3, 4, 9, 35, 50])
def test_a_stream_goes_on_where_its_state_was_taken(stream, taken, process, processes):
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


def test_another_process_s_state_is_refused(stream):
    with pytest.raises(DataError, match="saved by process 0 of 1 and is read by process 0 of 2: go on with as many"):
        stream(processes=2).load_state_dict(stream().state_dict())


# ---- rows and networks that fail


def test_broken_rows_are_passed_over_logged_and_counted(stream, tmp_path, caplog):
    rows = squares(0, 6)
    rows[2]["image"], rows[4]["image"] = b"not a picture", None
    one = stream(write(tmp_path / "some.parquet", rows), max_broken=0.5)
    assert sorted(take(one, 4)) == [0, 1, 3, 5] and sorted(take(one, 4)) == [0, 1, 3, 5]
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "skipped row 4: it has no image" in said and "skipped row 2: cannot identify it as a picture" in said
    state = one.state_dict()
    assert state["epoch"] == 1 and 8 < state["seen"] <= 12 and state["broken"] == state["seen"] - 8


def test_too_many_broken_rows_end_it_by_name(stream, tmp_path):
    rows = squares(0, 8)
    rows[3]["image"] = rows[5]["image"] = b"x"
    path = write(tmp_path / "some.parquet", rows)
    with pytest.raises(DataError, match=r"2 of the first \d rows of .* are broken, at most 1% may be, the last one row [35] \("):
        take(stream(path, max_broken=0.01), 32)
    one = stream(write(tmp_path / "none.parquet", [{"image": b"x", "text": "a"}]), max_broken=1)
    with pytest.raises(DataError, match="no usable row for process 0 of 1 in a whole epoch: 1 of 1 rows were broken"):
        take(one, 1)
    with pytest.raises(DataError, match="no usable row"):
        take(one, 1)


def test_rows_without_a_caption_are_unconditional_or_left_out(stream, tmp_path):
    rows = squares(0, 3)
    rows[1]["text"] = None
    path = write(tmp_path / "some.parquet", rows)
    assert sorted(stream(path).take(3).alternatives) == [[""], ["square 0"], ["square 2"]]
    assert sorted(take(stream(path, missing_caption="skip", max_broken=0), 2)) == [0, 2]


def flaky(errors):
    """30 rows of a generator that raises one of the errors each time it comes to row 13."""
    def rows():
        for i in range(30):
            if i == 13 and errors:
                raise errors.pop(0)
            yield {"image": {"bytes": png(i), "path": None}, "text": f"square {i}"}

    features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
    found = datasets.IterableDataset.from_generator(rows, features=features)
    read = lambda example, number: sources.table_row(example, number, "image", ("text",))
    return lambda config, split: sources.Rows(found, read, "flaky", "a flaky table")


def test_a_network_that_fails_now_and_then_changes_nothing(stream, monkeypatch):
    monkeypatch.setattr(sources, "WAITS", (0.01, 0.01))
    monkeypatch.setattr(sources, "open_rows", flaky([]))
    whole = take(stream(), 60)
    assert sorted(whole) == sorted([*range(30)] * 2)
    errors = [ConnectionError("reset"), TimeoutError("slow")]
    monkeypatch.setattr(sources, "open_rows", flaky(errors))
    assert take(stream(), 60) == whole and errors == []


@pytest.mark.parametrize(("error", "says"), [
    (ConnectionError("reset by peer"), r"cannot read a flaky table in 3 attempts \(reset by peer\): run the same command again"),
    (FileNotFoundError("shard 7 is gone"), "cannot read a flaky table: shard 7 is gone")])  # fmt: skip
def test_a_network_that_fails_for_good_is_one_sentence_and_the_place_before_it_is_kept(stream, monkeypatch, error, says):
    monkeypatch.setattr(sources, "WAITS", (0.01, 0.01))
    monkeypatch.setattr(sources, "open_rows", flaky([]))
    whole = take(stream(), 40)
    monkeypatch.setattr(sources, "open_rows", flaky([error] * 9))
    one = stream()
    with pytest.raises(DataError, match=says) as caught:
        take(one, 32)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(sources, "open_rows", flaky([]))
    mended = stream()
    mended.load_state_dict(one.state_dict())
    assert take(mended, 40) == whole


def test_closing_ends_a_wait_for_the_network(stream, monkeypatch):
    monkeypatch.setattr(sources, "WAITS", (600,))
    monkeypatch.setattr(sources, "open_rows", flaky([ConnectionError("reset")] * 9))
    one = stream(shuffle_buffer=30)
    one.coming = one.reader.submit(one.some)
    one.close()
    with pytest.raises(DataError, match="is closed"):
        one.coming.result(timeout=10)
