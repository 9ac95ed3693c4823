"""Paged caches need the host runtime, attnforge._host."""

from __future__ import annotations

import pytest

pytest.importorskip("attnforge._host", reason="attnforge._host is not built (make native)")
