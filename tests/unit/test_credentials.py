"""Credentials are found where the clouds' own tools look, and missing ones are reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import reach
from tests.servers.gcs import GCS
from trainer.bucket import open_run
from trainer.bucket.address import Patience, credentials_file
from trainer.errors import BucketError


def test_the_environment_goes_before_the_file(tmp_path: Path) -> None:
    """The credentials file is read only if the environment has no keys."""
    assert credentials_file({"AWS_ACCESS_KEY_ID": "a", "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path)}) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "no credentials of profile trainer"), ("[trainer]\naws_access_key_id = s3cr3t", "aws_secret_access_key"),
     ("s3cr3t", "not a credentials file")],
)  # fmt: skip
def test_a_named_profile_that_is_not_whole_is_said(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    """The error has a hint and quotes nothing from the file."""
    (tmp_path / "credentials").write_text(text)
    reach(
        monkeypatch,
        {"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"), "AWS_PROFILE": "trainer"},
    )
    with pytest.raises(BucketError, match=said) as caught:
        open_run(s3, "run", patience=Patience(0.5, 0.5, 0.5))
    assert "AWS_PROFILE" in str(caught.value)
    assert "s3cr3t" not in str(caught.value)


def test_a_google_machine_gets_its_token_from_the_metadata_server(
    gcs: str, gcs_host: tuple[GCS, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Application-default credentials need no variable and no file on a Google machine."""
    server, host = gcs_host
    monkeypatch.delenv("GOOGLE_BEARER_TOKEN")
    monkeypatch.setenv("GCE_METADATA_HOST", host)
    monkeypatch.setenv("HOME", str(tmp_path))
    given = server.tokens_given
    open_run(gcs, "run").put("key", b"data")
    assert server.tokens_given > given
