"""Every test of the dashboard starts from a server's default settings."""

from __future__ import annotations

import pytest

from avl_app.settings import VARIABLE


@pytest.fixture(autouse=True)
def _defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
