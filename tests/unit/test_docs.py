"""The documents name files that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_where_to_change_names_files_that_exist() -> None:
    """Every path in the table's last column is a file of the repository."""
    lines = (ROOT / "docs" / "where-to-change.md").read_text(encoding="utf-8").splitlines()
    rows = [line.strip("|").split("|") for line in lines if re.match(r"\| \d+ \|", line)]
    named = [re.findall(r"`([^`]+)`", row[-1]) for row in rows]
    assert named
    assert all(named)
    assert [path for paths in named for path in paths if not (ROOT / path).is_file()] == []
