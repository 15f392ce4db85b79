"""`launcher doctor`: what works, what is missing, how to fix it; it leaves nothing behind and shows no secret."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.cloud.fake import FakeCloud
from launcher.cloud.skypilot_records import enabled_of
from launcher.doctor.bucket import check_bucket
from launcher.doctor.checks import check_all, check_clouds, check_disk, check_trainer_python
from launcher.doctor.findings import HIDDEN, Check, Finding, run_all
from launcher.doctor.hub import check_data, check_model, check_token
from launcher.settings import VARIABLES, Settings
from tests.servers.hub import Hub
from trainer.bucket import open_run
from trainer.errors import BucketError, Unavailable, UserError
from trainer.recipe import DataSource, Recipe

TOKEN = "hf_0123456789abcdef"
TINY = "zephyr-tiny/dpo"


@pytest.fixture
def server() -> Iterator[Hub]:
    with Hub(token=TOKEN) as started:
        yield started


@pytest.fixture(autouse=True)
def _bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*VARIABLES, "HF_TOKEN", "HF_ENDPOINT", "WANDB_API_KEY", "AEOLUS_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))


def fine(name: str = "a") -> Finding:
    return Finding(name=name, status="ok", detail="there")


def test_checks_run_side_by_side_and_keep_their_order() -> None:
    """Checks run in parallel: each of these two waits for the other, so a sequence would never end."""
    meet = threading.Barrier(2)

    def wait(name: str) -> Finding:
        meet.wait(30)
        return fine(name)

    ended: list[str] = []
    checks = [Check(name, lambda name=name: wait(name), timeout_s=60) for name in "ab"]  # type: ignore[misc]
    assert [each.name for each in run_all(checks, environ={}, on_done=ended.append)] == ["a", "b"]
    assert ended == ["a", "b"]


def test_a_check_that_hangs_is_left_behind() -> None:
    """A check that exceeds its timeout is a failed finding, and the other checks are reported."""
    never = threading.Event()
    hanging = Check("network", lambda: [fine()] if never.wait() else [], timeout_s=0.05)
    hung, other = run_all([hanging, Check("b", lambda: fine("b"))], environ={})
    assert (hung.status, other.status) == ("failed", "ok")
    assert "no answer within 0.05 s" in hung.detail
    never.set()


def test_errors_are_findings_and_secrets_are_not_shown() -> None:
    """Errors and bugs of a check become findings, in which the values of secrets are hidden."""
    environ = {"HF_TOKEN": TOKEN, "AWS_SECRET_ACCESS_KEY": "s3cr3ts3cr3t", "HOME": "/home/user"}

    def refuses() -> Finding:
        raise UserError(f"Bearer {TOKEN} is refused at /home/user", hint="not s3cr3ts3cr3t")

    def breaks() -> Finding:
        raise RuntimeError(f"oh {TOKEN}")

    refused, broken = run_all([Check("a", refuses), Check("b", breaks, needed=False)], environ=environ)
    assert (refused.detail, refused.hint) == (
        f"Bearer {HIDDEN} is refused at /home/user",
        f"not {HIDDEN}",
    )
    assert refused.blocks_run
    assert broken.detail == f"RuntimeError: oh {HIDDEN}"
    assert not broken.blocks_run


def test_a_bucket_is_tried_and_left_as_it_was(uri: str) -> None:
    """A folder, S3 and GCS are written, listed and read, conditional writes work, and nothing remains."""
    found = check_bucket(uri, from_other_machines=False)
    assert [(each.name, each.status) for each in found] == [("bucket", "ok"), ("conditional put", "ok")]
    if "://" in uri:
        assert open_run(uri, "any").list() == []
    else:
        assert not Path(uri).exists()


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    """An existing folder and its content are not deleted."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").touch()
    check_bucket(str(tmp_path / "runs"), from_other_machines=False)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mine"]


def test_a_store_without_conditional_writes_is_reported_but_allowed(rclone: str) -> None:
    """A store without conditional writes is reported, but does not block the run."""
    written, conditions = check_bucket(rclone, from_other_machines=False)
    assert written.status == "ok"
    assert (conditions.status, conditions.blocks_run) == ("failed", False)
    assert open_run(rclone, "any").list() == []


def test_overrides_of_the_recipe_are_checked(tmp_path: Path) -> None:
    """Overrides of the recipe apply: the data of the override is checked."""
    data = tmp_path / "pairs.jsonl"
    data.write_text("{}\n")
    found = check_all(
        TINY,
        overrides=(f"dataset_mixture={data}",),
        infra=("local",),
        checkpoints=str(tmp_path / "runs"),
        environ={"AEOLUS_TRAINER_PYTHON": "/x"},
        cloud=FakeCloud(),
    )
    assert [each.detail for each in found if each.name == "data"] == [str(data)]


def test_an_address_that_cannot_be_is_a_finding() -> None:
    """An invalid address is one finding, and the other checks are reported too."""
    found = check_all(
        None,
        infra=("local",),
        checkpoints="gcs://b/runs",
        environ={"AEOLUS_TRAINER_PYTHON": "/x"},
        cloud=FakeCloud(),
    )
    [bucket_] = [each for each in found if each.name == "bucket"]
    assert bucket_.status == "failed"
    assert "gcs://b/runs" in bucket_.detail


def test_a_missing_bucket_is_the_store_s_error(s3: str) -> None:
    """The error of a missing bucket is the store's, and names the bucket."""
    with pytest.raises(BucketError, match="a-missing-bucket"):
        check_bucket("s3://a-missing-bucket/runs", from_other_machines=True)


def test_a_folder_will_not_do_for_other_machines() -> None:
    """A local folder blocks a run on other machines, and the hint has the option for a bucket."""
    (found,) = check_bucket("/shared/runs", from_other_machines=True)
    assert found.blocks_run
    assert "--checkpoints gs://" in str(found.hint)


@pytest.mark.parametrize(
    ("token", "status", "blocks_run"),
    [(None, "missing", False), (TOKEN, "ok", False), ("hf_another_one", "failed", True)],
)
def test_the_hub_is_asked_whether_it_knows_the_token(
    token: str | None, status: str, blocks_run: bool, server: Hub
) -> None:
    """A missing token does not block the run, but a wrong one does: with it the Hub refuses public files too."""
    environ = {"HF_ENDPOINT": server.url, **({"HF_TOKEN": token} if token else {})}
    found = check_token(environ)
    assert (found.status, found.blocks_run) == (status, blocks_run)
    assert TOKEN not in found.model_dump_json()


def test_an_unreachable_hub_does_not_judge_the_token() -> None:
    """If the Hub is unreachable from here, the token is not judged, because the nodes may reach it."""
    found = check_token({"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": TOKEN})
    assert (found.status, found.blocks_run) == ("skipped", False)


def recipe(model: str | None) -> Recipe:
    data = {"datasets": [{"id": "generated:preferences"}]}
    start = {"model_name_or_path": model} if model else {"init": "tiny"}
    return Recipe.model_validate(
        {"name": "r", "method": "dpo", "global_batch_size": 4, "dataset_mixture": data, **start}
    )


@pytest.mark.parametrize(
    ("answers", "status"),
    [
        ({"config.json": 200}, "ok"),
        ({"config.json": 307}, "ok"),
        ({"adapter_config.json": 200}, "ok"),
        ({"config.json": 401}, "failed"),
        ({"config.json": 403}, "failed"),
        ({"config.json": 500}, "failed"),
        ({}, "missing"),
    ],
)
def test_a_model_is_looked_for_on_the_hub(answers: dict[str, int], status: str, server: Hub) -> None:
    """One HEAD request checks the model; a redirect is not followed, because the token must not leave the Hub."""
    server.paths = {f"/org/model/resolve/main/{file}": code for file, code in answers.items()}
    found = check_model(recipe("org/model"), {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN})
    assert found.status == status
    assert {method for method, _, _ in server.asked} == {"HEAD"}
    assert bool(found.hint) is (status != "ok")


def test_models_and_data_that_need_no_hub(tmp_path: Path, server: Hub) -> None:
    """Generated models and data, and those on this machine or in a bucket, are checked without the Hub."""
    environ = {"HF_ENDPOINT": server.url}
    assert check_model(recipe(None), environ).status == "ok"
    assert check_model(recipe(str(tmp_path)), environ).status == "ok"
    assert check_model(recipe(f"{tmp_path}/nothing"), environ).status == "missing"
    assert check_model(recipe(f"file://{tmp_path}/run/final"), environ).status == "missing"
    assert check_data(DataSource(id="generated:chats"), environ).status == "ok"
    assert check_data(DataSource(id=str(tmp_path / "no.jsonl")), environ).status == "missing"
    assert not server.asked


@pytest.mark.parametrize(("code", "status"), [(200, "ok"), (401, "failed"), (404, "missing")])
def test_data_is_looked_for_on_the_hub(code: int, status: str, server: Hub) -> None:
    """A data set is checked on the Hub, with its revision if it has one."""
    server.paths = {"/api/datasets/org/data": code, "/api/datasets/org/data/revision/v1": code}
    environ = {"HF_ENDPOINT": server.url}
    assert check_data(DataSource(id="org/data"), environ).status == status
    assert check_data(DataSource(id="org/data", revision="v1"), environ).status == status


def test_one_cloud_will_do() -> None:
    """One usable cloud is enough; if none is usable, each has its reason."""
    cloud = FakeCloud()
    cloud.disabled = {"lambda": "Reason [compute]: no key"}
    found = check_clouds(cloud, ("gcp", "lambda"))
    assert [(each.status, each.blocks_run) for each in found] == [
        ("ok", False),
        ("ok", False),
        ("missing", False),
    ]
    cloud.disabled["gcp"] = "no credentials"
    assert [each.blocks_run for each in check_clouds(cloud, ("gcp", "lambda"))] == [False, True, True]


SKY_CHECK = [
    "Checking credentials to enable clouds for SkyPilot.",
    "\x1b[2m  GCP: disabled \x1b[0m",
    "    Reason [compute, storage]: Fail to get project id. Run the following commands:",
    "      $ gcloud init",
    "      $ gcloud auth application-default login",
    "    For more info: https://docs.skypilot.co",
    "    Details: [google.auth.exceptions.DefaultCredentialsError] Not found",
    "  Lambda: enabled [compute]",
    "  Slurm: disabled ",
    "    Reason [compute]: ~/.slurm/config does not exist.",
    "",
    "To enable a cloud, follow the hints above",
]


def test_sky_check_s_answer_is_read() -> None:
    """The enabled clouds are in the result, the reasons for the others in the printed report (SkyPilot 0.14.1)."""
    found = {"default": {"Lambda": ["compute"], "AWS": ["storage"]}}
    assert enabled_of(found, ["gcp/us-central1", "lambda", "aws", "slurm"], SKY_CHECK) == {
        "gcp": "Fail to get project id. Run the following commands:"
        " $ gcloud init $ gcloud auth application-default login",
        "lambda": None,
        "slurm": "~/.slurm/config does not exist.",
        "aws": "SkyPilot has no credentials for it",
    }


def test_a_trainer_s_python_that_is_not_there_is_named(tmp_path: Path) -> None:
    """A missing trainer Python is reported with its path, in the words of a run on this machine."""
    found = check_trainer_python(Settings(trainer_python=tmp_path / "python"), {}, needed=True)
    assert found.blocks_run
    assert f"{tmp_path}/python, which does not exist" in found.detail


def test_a_full_disk_blocks_a_run_on_this_machine(tmp_path: Path) -> None:
    """A full disk blocks a run on this machine, but not one elsewhere."""
    assert check_disk({"scratch": tmp_path / "not" / "yet"}, needed=True).detail.endswith(
        "GB free for scratch"
    )
    assert check_disk({"scratch": tmp_path}, needed=True, min_gb=1e9).blocks_run
    assert not check_disk({"scratch": tmp_path}, needed=False, min_gb=1e9).blocks_run


def doctor(
    capsys: pytest.CaptureFixture[str], *words: str, cloud: FakeCloud | None = None
) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *words], cloud=cloud or FakeCloud())
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().out


def statuses(out: str) -> dict[str, str]:
    return {each["name"]: each["status"] for each in json.loads(out)["checks"]}


def test_a_run_in_the_cloud_that_has_all_it_needs(
    s3: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, server: Hub
) -> None:
    """Exit code 0 although optional things are missing; the output has no token, as text and as JSON."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    words = (TINY, "--infra", "gcp", "--checkpoints", s3)
    code, out = doctor(capsys, *words, "--json")
    found = statuses(out)
    assert (code, json.loads(out)["ready"]) == (0, True)
    expected = (
        "settings",
        "launcher",
        "SkyPilot",
        "SkyPilot's server",
        "gcp",
        "bucket",
        "Hub token",
        "recipe",
        "model",
        "data",
    )
    assert {found[name] for name in expected} == {"ok"}
    assert found["W&B token"] == "missing"
    code, text = doctor(capsys, *words)
    assert code == 0
    assert "ready: everything required works" in text
    assert TOKEN not in out + text


@pytest.mark.parametrize(
    ("words", "fault", "name"),
    [
        ([TINY], None, "bucket"),
        (["zephyr-tiny/dpp", "--checkpoints", "S3"], None, "recipe"),
        (
            [TINY, "--checkpoints", "S3"],
            Unavailable("SkyPilot's API server does not answer"),
            "SkyPilot's server",
        ),
    ],
)
def test_a_missing_requirement_is_exit_code_2(
    words: Sequence[str], fault: UserError | None, name: str, s3: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing requirement is exit code 2, and all other checks are reported."""
    words = [s3 if word == "S3" else word for word in words]
    code, out = doctor(capsys, *words, "--infra", "gcp", "--json", cloud=FakeCloud(fault=fault))
    assert (code, json.loads(out)["ready"]) == (2, False)
    assert statuses(out)[name] in ("missing", "failed")
    assert statuses(out)["launcher"] == "ok"
    code, text = doctor(capsys, *words, "--infra", "gcp", cloud=FakeCloud(fault=fault))
    assert f"not ready: {name}" in text


def test_unreadable_settings_are_the_only_finding(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """If the settings cannot be read, only that is reported, because every other check depends on them."""
    monkeypatch.setenv("AEOLUS_CONFIG", str(tmp_path / "none.toml"))
    code, out = doctor(capsys, "--json")
    assert (code, statuses(out)) == (2, {"settings": "failed"})


def test_a_run_on_this_machine_needs_no_cloud(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """For a local run a folder is fine, and SkyPilot is not asked."""
    cloud = FakeCloud(fault=Unavailable("asked"))
    _code, out = doctor(
        capsys, "--infra", "local", "--checkpoints", str(tmp_path / "runs"), "--json", cloud=cloud
    )
    found = statuses(out)
    assert (found["bucket"], found["SkyPilot"], found["recipe"]) == ("ok", "skipped", "skipped")
    assert not cloud.asked
