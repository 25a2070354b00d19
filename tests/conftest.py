"""What holds for all tests."""

import signal

import pytest

# A shell that starts the tests in the background has switched Ctrl-C off, for them and for the runs they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No release is small enough for graphs, each of which costs seconds; test_graphs.py sets the limit back."""
    monkeypatch.setattr("pretrain.models.release.graphs.MOST_BYTES", 0)
