"""Requests are retried while the Hub is busy, and errors become one HubError."""

import httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

from pipeline.hub import client
from pipeline.hub.client import HubError
from pipeline.models.trusted import ModelError, download_errors


def http_error(status, message=""):
    """Return the client's error for an answer with a status."""
    request = httpx.Request("POST", "https://hub.test")
    response = httpx.Response(status, request=request)
    return HfHubHTTPError("failed", response=response, server_message=message)


@pytest.fixture
def attempts(monkeypatch):
    """A request that fails with each error of a list, then returns "done"; and its log."""
    monkeypatch.setattr(client, "RETRY_WAITS", (0, 0))
    log = []

    def make(*errors):
        remaining = list(errors)

        def request():
            log.append(1)
            if remaining:
                raise remaining.pop(0)
            return "done"

        return request

    make.log = log
    return make


def test_with_retries_repeats_transient_errors(attempts):
    request = attempts(http_error(503), RuntimeError("Xet: connection reset"))
    assert client.with_retries(request) == "done"
    assert len(attempts.log) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409])
def test_with_retries_gives_up_at_once_when_refused(status, attempts):
    with pytest.raises(HfHubHTTPError) as caught:
        client.with_retries(attempts(http_error(status)))
    assert caught.value.response.status_code == status
    assert len(attempts.log) == 1


@pytest.mark.parametrize("status", [408, 412, 429, 500, 502, 503, 504])
def test_with_retries_raises_after_the_last_attempt(status, attempts):
    errors = [http_error(status) for _ in range(3)]
    with pytest.raises(HfHubHTTPError) as caught:
        client.with_retries(attempts(*errors))
    assert caught.value is errors[-1]
    assert len(attempts.log) == 3


def test_with_retries_unwraps_a_failed_upload(attempts):
    """The client wraps the answer to an upload in a RuntimeError."""
    wrapped = RuntimeError("Error while uploading")
    wrapped.__cause__ = http_error(403)
    with pytest.raises(HfHubHTTPError):
        client.with_retries(attempts(wrapped))
    assert len(attempts.log) == 1


@pytest.mark.parametrize(
    ("error", "count"),
    [
        (RuntimeError("Xet: connection reset"), 3),
        (OSError("No space left"), 1),
        (PermissionError("Xet: token expired"), 1),
    ],
)
def test_upload_errors_explain_what_xet_raises(error, count, attempts):
    """Its transfers need a service that no test has; it raises RuntimeError and OSError."""
    with pytest.raises(HubError, match=str(error)), client.upload_errors("pushing to a/b"):
        client.with_retries(attempts(*[error] * 3))
    assert len(attempts.log) == count
    message = f"a/b cannot be downloaded: {error}"
    with pytest.raises(ModelError, match=message), download_errors("a/b"):
        raise error


@pytest.mark.parametrize(
    ("error", "culprit"),
    [
        (LocalTokenNotFoundError(), "hf auth login"),
        (http_error(401), "status 401"),
        (http_error(403, "no\nrights"), "status 403, .*: no rights"),
        (http_error(404), "status 404"),
        (http_error(429), "status 429, the Hub is busy"),
        (http_error(422, "bad YAML"), "status 422, the Hub rejected it.*: bad YAML"),
        (HTTPError("refused"), "no answer .*refused"),
        (ValueError("the metadata is wrong"), "rejected it: the metadata is wrong"),
    ],
)
def test_upload_errors_keep_the_cause_and_the_hint(error, culprit):
    uploading = client.upload_errors("pushing to a/b", "Push again.")
    with pytest.raises(HubError, match=culprit) as caught, uploading:
        raise error
    message = str(caught.value)
    assert message.startswith("pushing to a/b failed: ") and message.endswith(" Push again.")
    assert "\n" not in message and caught.value.__cause__ is error


@pytest.mark.parametrize("error", [HubError("ours"), ModelError("ours")])
def test_upload_errors_pass_our_own_errors_on(error):
    with pytest.raises(type(error), match="^ours$"), client.upload_errors("pushing to a/b"):
        raise error
