"""Requests: every value is checked, and every problem is named."""

import json
import math
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.diffusion.guidance import InputError
from pipeline.serving.requests import MAX_SEED, MAX_STEPS_PER_REQUEST, Request

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    max_leaves=3,
)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"steps": 3.7}, ("3.7", "1 to 1000")),
        ({"steps": 0}, ("0", "1 to 1000")),
        ({"steps": True}, ("True",)),
        ({"steps": "5"}, ("'5'",)),
        ({"steps": None}, ("None",)),
        ({"w": math.nan}, ("nan", "-10 to 30")),
        ({"w": math.inf}, ("inf", "-10 to 30")),
        ({"w": [1]}, ("[1]",)),
        ({"seed": -1}, ("-1",)),
        ({"seed": 2**53}, ("0 to 9007199254740991",)),
        ({"seed": None}, ("None",)),
        ({"images": 5}, ("5", "1 to 4")),
        ({"eta": 1.01}, ("1.01", "0 to 1")),
        ({"low": 0.8, "high": 0.2}, ("0.8 to 0.2",)),
        ({"prompt": {"a": 1}}, ("{'a': 1}",)),
        ({"prompt": "x" * 501}, ("501", "500")),
        ({"negative_prompt": None}, ("None",)),
        ({"prompt": "\ud83d"}, ("surrogate",)),
        ({"images": 4, "steps": 257}, ("1028", "1024")),
        ({"think": 0}, ("0", "1 to 16")),
        ({"think": 2.5}, ("2.5", "1 to 16")),
        ({"images": 2, "think": 4}, ("2", "4")),
        ({"steps": 65, "think": 16}, ("1040", "1024")),
        ({"size": 4096}, ("negative_prompt",)),
    ],
    ids=lambda x: str(x)[:40].encode("ascii", "replace").decode(),
)
def test_read_refuses_a_bad_value_by_name(raw, words):
    with pytest.raises(InputError, match=re.escape(next(iter(raw)))) as refused:
        Request.read(raw, T=1000)
    assert all(word in str(refused.value) for word in words)


def test_read_lists_every_problem():
    raw = {"prompt": 7, "steps": 0, "w": math.nan, "eta": 2}
    with pytest.raises(InputError) as refused:
        Request.read(raw, T=1000)
    assert all(f"{name} must" in str(refused.value) for name in raw)


def test_read_accepts_whole_numbers_as_floats():
    request = Request.read({"prompt": "", "steps": 7.0, "seed": 3.0, "w": 2}, T=1000)
    assert (request.steps, request.seed, request.w) == (7, 3, 2.0)
    assert type(request.steps) is int
    assert type(request.w) is float


# The first text loads Unicode's tables, which is slow.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(list(Request.__dataclass_fields__)), JSON))
def test_read_accepts_or_refuses_any_json(raw):
    try:
        request = Request.read(raw, T=1000)
    except InputError:
        return
    assert 1 <= request.steps * request.images * request.think <= MAX_STEPS_PER_REQUEST
    assert math.isfinite(request.w)
    assert 0 <= request.low <= request.high <= 1
    assert 0 <= request.seed <= MAX_SEED
    assert len(request.prompt) <= 500
    json.dumps(request.prompt).encode()
