"""The Hugging Face Hub: whether anyone answers there is found in seconds, before its libraries ask for half a minute.

What `HF_ENDPOINT`, `HF_HUB_OFFLINE` and `HF_HUB_ETAG_TIMEOUT` say holds here too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

RETRIES = 2  # after one second and two: a connection that was lost once is not a missing network


@contextmanager
def hub() -> Iterator[None]:
    """Ask the Hub for something: where nobody answers, its libraries read their caches alone, and fail at once.

    An answer of any status is one; a network is given three tries of `HF_HUB_ETAG_TIMEOUT` (10 seconds unless it is
    set), so that a slow one is not taken for none. Where it answers, the libraries try as often as they do; they do not
    say on standard error that they try again.
    """
    from huggingface_hub import constants

    with _errors_alone("huggingface_hub"):
        before: Any = constants.HF_HUB_OFFLINE
        try:
            constants.HF_HUB_OFFLINE = before or not _answers()  # what the variable of that name sets
            yield
        finally:
            constants.HF_HUB_OFFLINE = before


def _answers() -> bool:
    from huggingface_hub import constants
    from huggingface_hub.utils import http_backoff

    try:
        http_backoff(
            "HEAD", constants.ENDPOINT, max_retries=RETRIES, retry_on_status_codes=(),
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )  # fmt: skip
    except Exception:  # those of several network clients
        return False
    return True


@contextmanager
def _errors_alone(library: str) -> Iterator[None]:
    """Without a library's warnings."""
    log = logging.getLogger(library)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
