"""A stream has every row once an epoch and resumes exactly where it was."""

import json

import datasets
import pytest
import torch
from datasets_on_disk import png, squares, write_parquet

from pipeline.data import streaming
from pipeline.data.sources import rows as rows_module
from pipeline.data.sources.rows import DataError, Rows, Unreachable
from pipeline.data.sources.table import table_row


def take(stream, n):
    """Return the numbers of the next n images, which are also in their captions."""
    batch = stream.take(n)
    assert batch.images.shape == (n, 3, 4, 4)
    assert batch.images.dtype == torch.uint8
    reds = batch.images[:, 0, 0, 0].tolist()
    assert list(batch.alternatives) == [[f"square {i}"] for i in reds]
    return reds


def test_take_has_every_row_once_per_epoch_in_new_order(stream):
    epochs = [take(one, 35) for one in (stream(), stream(seed=1)) for _ in range(2)]
    assert all(sorted(epoch) == [*range(35)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[0] != sorted(epochs[0])
    assert take(stream(), 35) == epochs[0], "a function of the seed"


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_stream_processes_share_an_epoch(stream, processes):
    """By shards if their number allows (5), else by rows (2, 3)."""
    lengths = [len(range(i, 35, processes)) for i in range(processes)]
    shares = [take(stream(process=i, processes=processes), n) for i, n in enumerate(lengths)]
    assert sorted(i for share in shares for i in share) == [*range(35)]


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
    assert take(whole, 17) + take(whole, 23) == rest, "the size of a batch does not matter"


def test_load_state_dict_refuses_another_process_state(stream):
    with pytest.raises(DataError, match="0 of 1 .* 0 of 2"):
        stream(processes=2).load_state_dict(stream().state_dict())


def test_take_skips_logs_and_counts_broken_rows(stream, tmp_path, caplog):
    rows = squares(0, 6)
    rows[2]["image"] = b"not an image"
    rows[4]["image"] = None
    one = stream(write_parquet(tmp_path / "some.parquet", rows), max_broken=0.5)
    assert sorted(take(one, 4)) == [0, 1, 3, 5]
    assert sorted(take(one, 4)) == [0, 1, 3, 5]
    logged = " ".join(record.getMessage() for record in caplog.records)
    assert "skipped row 4: it has no image" in logged
    assert "skipped row 2: cannot identify it as an image" in logged
    state = one.state_dict()
    assert state["epoch"] == 1
    assert 8 < state["seen"] <= 12
    assert state["broken"] == state["seen"] - 8


def test_take_refuses_too_many_broken_rows(stream, tmp_path):
    rows = squares(0, 8)
    rows[3]["image"] = rows[5]["image"] = b"x"
    path = write_parquet(tmp_path / "some.parquet", rows)
    with pytest.raises(DataError, match=r"2 of the first \d rows .* row [35] \(.*\(1%\)"):
        take(stream(path, max_broken=0.01), 32)


def test_take_refuses_an_epoch_without_usable_rows(stream, tmp_path):
    path = write_parquet(tmp_path / "none.parquet", [{"image": b"x", "text": "a"}])
    one = stream(path, max_broken=1)
    for _ in range(2):
        with pytest.raises(DataError, match="process 0 of 1: 1 of 1"):
            take(one, 1)


def test_take_keeps_or_skips_rows_without_caption(stream, tmp_path):
    rows = squares(0, 3)
    rows[1]["text"] = None
    path = write_parquet(tmp_path / "some.parquet", rows)
    assert sorted(stream(path).take(3).alternatives) == [[""], ["square 0"], ["square 2"]]
    assert sorted(take(stream(path, missing_caption="skip", max_broken=0), 2)) == [0, 2]


@pytest.fixture
def flaky(monkeypatch):
    """Make streams read 30 rows of a source that raises the next error at row 13."""
    features = {"image": datasets.Image(decode=False), "text": datasets.Value("string")}

    def read(example, number):
        return table_row(example, number, "image", ("text",))

    def use(errors, waits=(0.01, 0.01)):
        def rows():
            for i in range(30):
                if i == 13 and errors:
                    raise errors.pop(0)
                yield {"image": {"bytes": png(i), "path": None}, "text": f"square {i}"}

        table = datasets.IterableDataset.from_generator(rows, features=datasets.Features(features))
        opened = Rows(table, read, "flaky", "a flaky table")
        monkeypatch.setattr(streaming, "open_rows", lambda config, split: opened)
        monkeypatch.setattr(rows_module, "READ_WAITS", waits)

    return use


def test_take_is_the_same_after_network_errors(stream, flaky):
    flaky([])
    whole = take(stream(), 60)
    assert sorted(whole) == sorted([*range(30)] * 2)
    errors = [ConnectionError("reset"), TimeoutError("slow")]
    flaky(errors)
    assert take(stream(), 60) == whole
    assert errors == []


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ConnectionError("reset by peer"), Unreachable, r"in 3 attempts \(reset by peer\)"),
        (FileNotFoundError("shard 7 is gone"), DataError, "a flaky table: shard 7 is gone"),
    ],
)
def test_take_fails_in_one_line_and_keeps_its_position(stream, flaky, error, kind, message):
    flaky([])
    whole = take(stream(), 40)
    flaky([error] * 9)
    one = stream()
    with pytest.raises(kind, match=message) as caught:
        take(one, 32)
    assert "\n" not in str(caught.value)
    assert caught.type is kind
    flaky([])
    resumed = stream()
    resumed.load_state_dict(one.state_dict())
    assert take(resumed, 40) == whole


def test_close_ends_a_wait_for_the_network(stream, flaky):
    flaky([ConnectionError("reset")] * 9, waits=(600,))
    one = stream(shuffle_buffer=30)
    pending = one.reader.submit(one.read_ahead, 1)
    one.close()
    with pytest.raises(DataError, match="closed"):
        pending.result(timeout=10)
