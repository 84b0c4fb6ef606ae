"""What the benchmarks share: turns, intervals, and sections of a document."""

import re
from pathlib import Path

import numpy as np

from benchmarks import bench

ROOT = Path(__file__).parents[2]


def test_in_turns_makes_the_calls_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "AB"}
    seconds = bench.in_turns(calls, 3)
    assert "".join(order) == "AB" + "AB" * 3
    assert [len(some) for some in seconds.values()] == [3, 3]


def test_paired_has_the_interval_of_a_mean():
    """For many normal differences it is mean ± 1.96 sd / sqrt(n); a constant one has no width."""
    difference = np.random.default_rng(0).normal(0.3, 2.0, 4000)
    # What pairs share does not widen the interval.
    theirs = np.random.default_rng(1).normal(0, 50, 4000)
    found = bench.paired(theirs + difference, theirs)
    mean = difference.mean()
    half = 1.96 * difference.std() / len(difference) ** 0.5
    assert np.allclose(found, [mean, mean - half, mean + half], atol=0.1 * half)
    assert bench.paired([1, 0, 1], [0, -1, 0]) == (1, 1, 1)


def test_spread_and_ratios_and_target_report_values():
    assert bench.spread([3, 1, 2], ".1f") == "2.0 (1.0 to 3.0)"
    assert bench.ratios([2, 9], [1, 3]) == [2, 3]
    assert "**met**" in bench.target("x", 2, 2)
    assert "**not met**" in bench.target("x", 1.99, 2)
    assert "**met**" in bench.target("x", 0.4, 0.5, at_least=False)
    assert "**not met**" in bench.target("x", 0.6, 0.5, at_least=False)


def test_put_adds_a_section_with_its_heading_once(tmp_path):
    path = tmp_path / "new" / "b.md"
    for body in ("old", "new"):
        bench.put(path, "<!-- x -->", "<!-- /x -->", body, "## Heading\n\n")
    assert path.read_text() == "# Benchmarks\n\n## Heading\n\n<!-- x -->\nnew\n<!-- /x -->\n"


def test_publish_replaces_a_section_and_nothing_else(tmp_path):
    args = bench.parser("").parse_args(["--output", str(tmp_path / "new" / "b.md")])
    for script, words in (("a.py", "old"), ("b.py", r"stays \1"), ("a.py", "new")):
        bench.publish(args, script, ["--n", "1 2"], script, words)
    text = args.output.read_text()
    assert "old" not in text
    assert text.index("new") < text.index(r"stays \1")
    assert text.count("## a.py") == 1
    assert "Command: `python benchmarks/a.py --n '1 2'`" in text


def test_parse_sends_quick_numbers_to_a_document_of_their_own():
    assert bench.parse(bench.parser(""), []).output == bench.DOCUMENT
    assert bench.parse(bench.parser(""), ["--quick"]).output == bench.QUICK_DOCUMENT


def test_table_is_markdown():
    assert bench.table(["a", "b"], [[1, 2]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_publish_finds_every_section_of_the_document():
    """The marks are on lines of their own, once each, in order."""
    text = (ROOT / bench.DOCUMENT).read_text()
    marks = re.findall(r"^<!-- (\w+): (generated|end) -->$", text, re.M)
    assert [what for _, what in marks] == ["generated", "end"] * (len(marks) // 2)
    names = [name for name, _ in marks]
    assert names[::2] == names[1::2]
    known = {"scheduler", "sampling", "guidance", "training", "growth", "muon", "ladder"}
    known |= {"autoencoder"}
    assert sorted(names[::2]) == sorted(known)
