"""What a user reads of a server that gives no answer: why, not how many layers of clients said so."""

import socket

import pytest
import urllib3

from spin import store, tracking
from spin.errors import SpinError, cause
from spin.store import Store

REFUSED = "[Errno 111] Connection refused"


@pytest.fixture
def nowhere() -> str:
    """Give an address of this computer that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_a_refused_connection_and_an_unknown_name(nowhere: str) -> None:
    for url, expected in ((nowhere, REFUSED), ("http://name.invalid", "Failed to resolve 'name.invalid' ([Errno")):
        with pytest.raises(urllib3.exceptions.HTTPError) as caught:
            urllib3.PoolManager(retries=urllib3.Retry(total=0)).request("GET", url)
        assert cause(caught.value).startswith(expected)
        # Other clients put the same into text of their own.
        assert cause(RuntimeError(f"request failed with {caught.value}")).startswith(expected)


def test_what_is_cut_is_cut_between_words() -> None:
    assert cause(ValueError("one-two " * 40)) == "one-two " * 24 + "..."
    assert cause(ValueError(f"{'x' * 180} http://ann:se-cret-{'y' * 20}@host")) == f"{'x' * 180} ..."
    assert cause(ValueError("one\x1b\ntwo")) == "one\\x1b"
    assert cause(ValueError()) == cause(ValueError("(Caused by Odd(''))")) == "ValueError"


def test_s3_that_is_away(nowhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SOON", urllib3.Retry(total=0))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")

    with pytest.raises(SpinError) as caught:
        Store("s3://spin", nowhere).check()

    said = f"expected an S3 server, got {REFUSED} ({nowhere}, s3://spin); check store_endpoint and the network"
    assert str(caught.value) == said


def test_mlflow_that_is_away(nowhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    with pytest.raises(SpinError) as caught:
        tracking.server_version(nowhere)

    said = f"expected an answer from MLflow at {nowhere}, got {REFUSED}; check tracking_uri, the server and the network"
    assert str(caught.value) == said
