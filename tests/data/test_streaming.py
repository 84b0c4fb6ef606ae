"""A stream gives every row once an epoch, to one process or shared by several, and goes on exactly where it was."""

import io
import json
import os
import signal
import time

import datasets
import pytest
import torch
from PIL import Image
from test_sources import png, squares, write
from training_runs import (  # noqa: F401
    ROOT,
    TINY,
    Broken,
    alike,
    encoder,
    killed_after,
    log,
    same,
    train,
    weights,
)

from pipeline import randomness
from pipeline.config import DataConfig, load_file
from pipeline.data import sources
from pipeline.data.sources import rows as rows_module
from pipeline.data.sources.rows import DataError, Rows, Unreachable
from pipeline.data.sources.table import table_row
from pipeline.data.streaming import Stream
from pipeline.runs.folder import RunFolder

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
    shares = [
        [*range(i, SHARDS * ROWS, processes)] for i in range(processes)
    ]  # only their lengths matter
    taken = [
        take(stream(process=i, processes=processes), len(share)) for i, share in enumerate(shares)
    ]
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
    with pytest.raises(
        DataError, match="saved by process 0 of 1 and is read by process 0 of 2: go on with as many"
    ):
        stream(processes=2).load_state_dict(stream().state_dict())


# ---- rows and networks that fail


def test_broken_rows_are_passed_over_logged_and_counted(stream, tmp_path, caplog):
    rows = squares(0, 6)
    rows[2]["image"], rows[4]["image"] = b"not a picture", None
    one = stream(write(tmp_path / "some.parquet", rows), max_broken=0.5)
    assert sorted(take(one, 4)) == [0, 1, 3, 5] and sorted(take(one, 4)) == [0, 1, 3, 5]
    said = " ".join(record.getMessage() for record in caplog.records)
    assert (
        "skipped row 4: it has no image" in said
        and "skipped row 2: cannot identify it as a picture" in said
    )
    state = one.state_dict()
    assert state["epoch"] == 1 and 8 < state["seen"] <= 12 and state["broken"] == state["seen"] - 8


def test_too_many_broken_rows_end_it_by_name(stream, tmp_path):
    rows = squares(0, 8)
    rows[3]["image"] = rows[5]["image"] = b"x"
    path = write(tmp_path / "some.parquet", rows)
    with pytest.raises(
        DataError,
        match=r"2 of the first \d rows of .* are broken, at most 1% may be, the last one row [35] \(",
    ):
        take(stream(path, max_broken=0.01), 32)
    one = stream(write(tmp_path / "none.parquet", [{"image": b"x", "text": "a"}]), max_broken=1)
    with pytest.raises(
        DataError,
        match="no usable row for process 0 of 1 in a whole epoch: 1 of 1 rows were broken",
    ):
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

    features = datasets.Features(
        {"image": datasets.Image(decode=False), "text": datasets.Value("string")}
    )
    found = datasets.IterableDataset.from_generator(rows, features=features)
    read = lambda example, number: table_row(example, number, "image", ("text",))
    return lambda config, split: Rows(found, read, "flaky", "a flaky table")


def test_a_network_that_fails_now_and_then_changes_nothing(stream, monkeypatch):
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
def test_a_network_that_fails_for_good_is_one_sentence_and_the_place_before_it_is_kept(
    stream, monkeypatch, error, says, kind
):
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


def test_closing_ends_a_wait_for_the_network(stream, monkeypatch):
    monkeypatch.setattr(rows_module, "READ_WAITS", (600,))
    monkeypatch.setattr(sources, "open_rows", flaky([ConnectionError("reset")] * 9))
    one = stream(shuffle_buffer=30)
    one.coming = one.reader.submit(one.some, 1)
    one.close()
    with pytest.raises(DataError, match="is closed"):
        one.coming.result(timeout=10)


# ---- training on one


@pytest.fixture(scope="module")
def config(table, encoder, tmp_path_factory):
    """test_train's run on the table, with every setting that draws something at each step; 'both' has two captions a row."""
    folder = tmp_path_factory.mktemp("run")
    rows = [
        {"image": big(i), "text": f"square {i}", "other": "red" if i % 2 else None}
        for i in range(12)
    ]
    path = write(folder / "both.parquet", rows)
    more = "streaming: true, flip: true, shuffle_buffer: 5, caption_column: [text, other], "
    text = TINY.replace(
        "{source: SOURCE, held_out: HELD, ", f"{{source: {path}, held_out: train, {more}"
    )
    (folder / "tiny.yaml").write_text(
        text.replace("ENCODER", str(encoder)).replace("CACHE", str(folder / "cache"))
    )
    return folder / "tiny.yaml"


def big(i):
    """A picture that differs from its mirror image."""
    buffer = io.BytesIO()
    ramp = (
        Image.linear_gradient("L")
        .transpose(Image.Transpose.ROTATE_90)
        .resize((16, 16))
        .convert("RGB")
    )
    ramp.point(lambda value: (value + 20 * i) % 256).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """One uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    return out / "tiny", train(config, out)


def test_a_run_trains_on_a_stream_and_says_what_is_known_of_it(whole):
    run, done = whole
    assert (run / "pipeline" / "model_index.json").exists()
    assert (
        "both.parquet (train), the first 12 rows of a stream: 12 of 12 images usable" in done.stdout
    )
    assert "1 to 2 (median 2) captions an image" in done.stdout and "captions of" in done.stdout


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_on_a_stream_resumes_in_the_same_bytes(whole, tmp_path, step):
    run = killed_after(step, whole[0], tmp_path)
    assert f"resuming from step {step}" in train(run / "config.yaml", tmp_path).stdout
    assert same(weights(run), weights(whole[0]))


@pytest.mark.parametrize("more", [(), ("--train.accumulation", "2")])
def test_a_stream_that_fails_for_good_saves_the_steps_before(whole, tmp_path, monkeypatch, more):
    """Between two periodic checkpoints, and between two micro-steps: the last whole step is kept, with its place."""
    real, taken = Stream.take, []

    def take(self, n):
        taken.append(n)
        if sum(taken) > 4 * 4 + 2:  # in the fifth batch of four
            raise Unreachable(
                "cannot read both.parquet in 3 attempts (reset by peer): run the same command again"
            )
        return real(self, n)

    config, seldom = whole[0] / "config.yaml", ("--train.save_every", "100", *more)
    if more:
        train(config, tmp_path / "whole", *seldom)
    monkeypatch.setattr(Stream, "take", take)
    done = train(config, tmp_path, *seldom, check=False)
    assert done.returncode == 1
    assert (
        "(reset by peer)" in done.stderr
        and "Step 4 is saved" in done.stderr
    )
    monkeypatch.setattr(Stream, "take", real)
    assert "resuming from step 4" in train(config, tmp_path, *seldom).stdout
    assert same(
        weights(tmp_path / "tiny"), weights(tmp_path / "whole" / "tiny" if more else whole[0])
    )


@pytest.mark.parametrize("every", ["2", "100"])
def test_a_stop_is_heard_while_a_stream_is_waited_for(whole, tmp_path, monkeypatch, every):
    """The steps before are saved, once."""
    real, taken, saved, save = Stream.take, [], [], RunFolder.save

    def take(self, n):
        taken.append(n)
        if len(taken) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return real(self, n)

    monkeypatch.setattr(
        RunFolder,
        "save",
        lambda run, step, *more, **facts: saved.append(step) or save(run, step, *more, **facts),
    )
    monkeypatch.setattr(Stream, "take", take)
    done = train(whole[0] / "config.yaml", tmp_path, "--train.save_every", every, check=False)
    assert (
        done.returncode == 143
        and "Stopped (SIGTERM) after step 4 of 6" in done.stdout
    )
    assert saved == ([2, 4] if every == "2" else [4])
    monkeypatch.undo()
    assert (
        "resuming from step 4"
        in train(whole[0] / "config.yaml", tmp_path, "--train.save_every", every).stdout
    )
    assert same(weights(tmp_path / "tiny"), weights(whole[0]))


def test_a_streams_skipped_step_names_its_examples_by_their_place(whole, tmp_path, monkeypatch):
    Broken(monkeypatch, lambda step, slot: step == 2 and slot == 1)
    said = train(whole[0] / "config.yaml", tmp_path).stdout
    t = randomness.timesteps(load_file(whole[0] / "config.yaml").seed, 2, [1], 4, 100).item()
    assert f"step 3 is skipped: no finite loss for the batch's image 1 at t = {t}\n" in said


def test_a_stream_that_fails_before_the_first_step_leaves_no_checkpoint(
    whole, tmp_path, monkeypatch
):
    def take(self, n):
        raise DataError(
            "cannot read both.parquet in 3 attempts (reset by peer): run the same command again"
        )

    monkeypatch.setattr(Stream, "take", take)
    done = train(whole[0] / "config.yaml", tmp_path, check=False)
    assert done.returncode == 2
    assert "(reset by peer)" in done.stderr and "is saved" not in done.stderr
    assert not list((tmp_path / "tiny" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "setting", [("--data.flip", "false"), ("--data.caption_column", "text"), ("--seed", "1")]
)
def test_what_a_step_draws_changes_what_is_learnt(whole, tmp_path, setting):
    train(whole[0] / "config.yaml", tmp_path, *setting)
    assert not same(weights(tmp_path / "tiny"), weights(whole[0]))


def test_micro_steps_take_the_same_examples(whole, tmp_path):
    one_step = ("--train.precision", "no", "--train.steps", "1")
    train(whole[0] / "config.yaml", tmp_path, *one_step, "--train.accumulation", "2")
    train(whole[0] / "config.yaml", tmp_path / "one", *one_step)
    two, one = log(tmp_path / "tiny"), log(tmp_path / "one" / "tiny")
    assert "grad_norm" in two[0] and all(alike(a, b) for a, b in zip(two, one, strict=True))


@pytest.mark.parametrize("name", ["folder", "stream"])
def test_the_templates_run_dry_on_data_of_ones_own(name, table, tmp_path):
    if name == "folder":
        for split in ("train", "test"):
            (tmp_path / "set" / split).mkdir(parents=True)
            for i in range(3):
                (tmp_path / "set" / split / f"square {i}.png").write_bytes(png(i))
        source = ["--data.source", str(tmp_path / "set"), "--data.held_out", "test"]
    else:
        source = [
            "--data.source",
            str(table),
            "--data.held_out",
            "null",
            "--data.image_column",
            "image",
            "--data.caption_column",
            "text",
        ]
    small = [
        "--data.resolution",
        "16",
        "--data.cache",
        str(tmp_path / "cache"),
        "--train.batch_size",
        "4",
        "--train.threads",
        "1",
        "--model.patch_size",
        "2",
        "--model.channels",
        "[32, 32]",
        "--model.attention",
        "[false, true]",
        "--model.heads",
        "4",
    ]
    done = train(ROOT / "configs" / f"{name}.yaml", tmp_path / "out", *source, *small, "--dry_run")
    assert "images usable" in done.stdout and "weights to train" in done.stdout
