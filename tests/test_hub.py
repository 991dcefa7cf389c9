"""A Hub that does not answer is given up in seconds, and one that answers slowly is not given up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from empirics.hub import hub
from empirics.tokenizer import byte_tokenizer, load_tokenizer

NOBODY = "http://127.0.0.1:9"
COMMIT = "0123456789" * 4


class Served:
    """A hub of one file on this machine.

    Attributes:
        hangs: seconds before an answer, by the number of the request; what is beyond the list is answered at once.
        drops: so many requests at first get no answer.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.status, self.drops, self.content = 200, 0, b""
        self.hangs: list[float] = []
        served = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                number = len(served.requests)
                served.requests.append(f"{self.command} {self.path}")
                if number < served.drops:
                    self.close_connection = True
                    return
                time.sleep(served.hangs[number] if number < len(served.hangs) else 0.0)
                self.send_response(served.status)
                self.send_header("ETag", '"an-etag"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(len(served.content)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(served.content)

            do_HEAD = do_GET = answer

            def handle(self) -> None:
                with suppress(BrokenPipeError, ConnectionResetError):  # whoever asked has given up
                    super().handle()

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def served() -> Iterator[Served]:
    one = Served()
    yield one
    _http.close_session()
    one.server.shutdown()
    one.server.server_close()


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], list[float]]:
    """Makes an address the Hub's; the list gets the seconds that are waited for between tries, and nobody waits."""

    def hub_at(url: str) -> list[float]:
        waited: list[float] = []
        clock = type("Clock", (), {"sleep": staticmethod(waited.append), "time": staticmethod(time.time)})
        monkeypatch.setattr(_http, "time", clock)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        return waited

    return hub_at


def test_nobody_answers(at: Callable[[str], list[float]], capfd: pytest.CaptureFixture[str]) -> None:
    """Two waits of together three seconds, and the libraries are told; afterwards they may ask again."""
    waited = at(NOBODY)
    with hub():
        assert constants.is_offline_mode()
    assert not constants.is_offline_mode()
    assert waited == [1, 2]
    with pytest.raises(
        ValueError, match=r"is not in the local cache and cannot be fetched .*; put its tokenizer\.json"
    ):
        load_tokenizer("gpt2")
    assert waited == [1, 2, 1, 2]  # and none of the five of the library
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("status", [200, 401, 404, 429, 500, 503])
def test_an_answer_of_any_status_is_one(at: Callable[[str], list[float]], served: Served, status: int) -> None:
    served.status = status
    waited = at(served.url)
    with hub():
        assert not constants.is_offline_mode()
    assert (waited, len(served.requests)) == ([], 1)


def test_a_slow_network_is_none_that_is_missing(
    at: Callable[[str], list[float]], served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.hangs = [1.0, 1.0]
    waited = at(served.url)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
    with hub():
        assert not constants.is_offline_mode()
    assert (waited, len(served.requests)) == ([1, 2], 3)


def test_what_is_told_to_be_offline_asks_nobody(
    at: Callable[[str], list[float]], served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(served.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with hub():
        assert constants.is_offline_mode()
    assert constants.is_offline_mode()
    assert served.requests == []


@pytest.mark.parametrize("drops", [0, 1])
def test_a_tokenizer_is_fetched(at: Callable[[str], list[float]], served: Served, drops: int) -> None:
    """Also where the first connection is lost."""
    served.content, served.drops = byte_tokenizer().file.encode(), drops
    waited = at(served.url)
    assert load_tokenizer("gpt2").encode(["hi"])[0].tolist() == [105, 106]
    assert waited == [1] * drops
    asked = [line for line in served.requests if line.endswith("/openai-community/gpt2/resolve/main/tokenizer.json")]
    assert any(line.startswith("GET") for line in asked)
