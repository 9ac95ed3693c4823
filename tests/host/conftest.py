"""Tests of the host runtime need attnforge._host as it is in this tree."""

from __future__ import annotations

import pytest

pytest.importorskip("attnforge._host", reason="attnforge._host is not built (make native)")
