"""Tokens that these tests make are kept in a folder of theirs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def token_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMSPEC_CACHE", str(tmp_path_factory.mktemp("tokens")))
        yield
