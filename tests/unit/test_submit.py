"""Submissions to a stand-in for SkyPilot: launched once, followed, recognised when repeated, refused."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.cloud.fake import FakeCloud
from launcher.cloud.protocol import JobStatus, Kind, LaunchRequest, Phase
from launcher.image.builders import BuildOptions
from launcher.local.process import Home, LocalRecord
from launcher.local.progress import LineView
from launcher.registry import submitted
from launcher.registry.submitted import StartedRun
from launcher.runs.run import Reader, RunHistory
from launcher.submit.follow import SubmitContext
from launcher.submit.launch import submit
from launcher.submit.outcome import Ending, judge
from launcher.submit.prepare import Submission
from launcher.submit.task import Candidate, TaskSpec, task_config
from launcher.terminal import Answer
from tests.fakes.runs import attempt_events, write_commit, write_events
from tests.unit.test_task import BASE
from trainer.bucket import open_run
from trainer.errors import Unavailable, UserError

NAME = "a-run"
PLACE = Candidate(infra="gcp", accelerators="A100:8", use_spot=True)


def standing(phase: Phase = "running", *, kind: Kind = "managed job", **given: Any) -> JobStatus:
    some = {"kind": kind, "name": NAME, "job_id": 3, "phase": phase, "raw_status": phase.upper()}
    return JobStatus.model_validate({**some, **given})


class Scripted(FakeCloud):
    """A cloud whose job enters the next phase each time its log ends."""

    def __init__(self, *phases: Phase, **given: Any) -> None:
        super().__init__(**given)
        self.phases = list(phases)
        self.interrupted = False

    def logs(self, status: JobStatus, say: Any, **options: Any) -> None:
        super().logs(status, say, **options)
        if self.interrupted:
            self.interrupted = False
            raise KeyboardInterrupt
        self._next()

    def tried(self, status: JobStatus) -> Sequence[str]:
        lines = super().tried(status)
        self._next()
        return lines

    def _next(self) -> None:
        if self.phases:
            phase = self.phases.pop(0)
            for key, each in self.statuses.items():
                self.statuses[key] = each.model_copy(update={"phase": phase, "raw_status": phase.upper()})


class Site:
    """A bucket, a state folder, and the launcher's messages."""

    def __init__(self, root: Path) -> None:
        self.runs = root / "runs"
        self.state = root / "state"
        self.said: list[str] = []
        self.wishes: BuildOptions | None = None
        self.built: list[BuildOptions] = []

    def order(self, *, managed: bool = True) -> Submission:
        request = TaskSpec(run_id=NAME, recipe="r", checkpoints=str(self.runs), candidates=(PLACE,))
        launch = LaunchRequest(
            kind="managed job" if managed else "cluster",
            name=NAME,
            run_id=NAME,
            recipe="zephyr-7b/dpo_full",
            checkpoints=str(self.runs),
            task=task_config(BASE, request),
            secrets={"HF_TOKEN": "hf_0123456789"},
            retry_until_up=True,
        )
        return Submission(launch=launch, where=request.where, build=self.wishes)

    def submit(
        self, cloud: FakeCloud, *, managed: bool = True, detach: bool = False, answer: Answer | None = None
    ) -> tuple[Ending, RunHistory]:
        desk = SubmitContext(
            backend=cloud,
            state=self.state,
            view=LineView(self.said.append),
            build=lambda wishes, _say: self.built.append(wishes),
            ask=(lambda: answer) if answer else None,
            now=lambda: 1000.0,
            sleep=lambda _: None,
        )
        return submit(self.order(managed=managed), desk, detach=detach)

    def sent(self) -> StartedRun | None:
        return submitted.recall(self.state, NAME, str(self.runs))

    def trained(self, *, end: dict[str, Any] | None = None, done: bool = False) -> None:
        folder = self.runs / NAME
        write_events(folder, attempt_events(1, start=0, last=10, total_steps=20, end=end))
        write_commit(folder, "step-00000010")
        if done:
            write_commit(folder, "final", created="2026-01-01T00:05:00Z")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_a_managed_job_is_launched_once_and_followed(site: Site) -> None:
    """SkyPilot receives the task and the secrets. The places that it tries are shown until the job runs."""
    cloud = Scripted("running", "done", ends="waiting")
    ending, _ = site.submit(cloud)
    ((kind, name, config),) = cloud.launched
    assert (kind, name, config) == ("managed job", NAME, site.order().launch.task)
    assert cloud.secrets == {"HF_TOKEN": "hf_0123456789"}
    assert "trying GCP for a-run" in site.said
    assert "a line of the log" in site.said
    assert ending.how == "failed"  # SkyPilot is content, and the bucket has no model


def test_a_cluster_is_launched_with_its_own_patience(site: Site) -> None:
    """`--retry-until-up` reaches SkyPilot."""
    cloud = Scripted("done")
    site.submit(cloud, managed=False)
    assert cloud.launched[0][0] == "cluster"
    assert "retry until up: True" in cloud.asked


def test_the_bucket_says_that_it_is_done(site: Site) -> None:
    """A run is done when its final model is committed."""

    class Trains(Scripted):
        def logs(self, status: JobStatus, say: Any, **options: Any) -> None:
            site.trained(done=True)
            super().logs(status, say, **options)

    ending, run = site.submit(Trains("done"))
    assert (ending.how, ending.exit_code, run.state) == ("done", 0, "done")
    assert ending.message.endswith("/a-run/final")


def test_a_done_run_is_not_launched_again(site: Site) -> None:
    """SkyPilot is not even asked."""
    site.trained(done=True)
    cloud = FakeCloud()
    ending, _ = site.submit(cloud)
    assert ending.how == "done"
    assert not cloud.asked


@pytest.mark.parametrize("kind", ["managed job", "cluster"])
@pytest.mark.parametrize("phase", ["waiting", "running", "recovering"])
def test_a_running_job_is_followed_and_not_rented_twice(site: Site, kind: Kind, phase: Phase) -> None:
    """The same submission is the same run, whatever kind of job it is, and wherever it was submitted from."""
    cloud = Scripted("running", "done", "done")
    cloud.statuses[kind, NAME] = standing(phase, kind=kind)
    site.submit(cloud)
    assert not cloud.launched
    assert "is already running" in site.said[0]
    sent = site.sent()
    assert sent
    assert (sent.kind, sent.job_id) == (kind, 3)


@pytest.mark.parametrize("phase", ["failed", "cancelled", "done", "idle"])
def test_what_is_over_is_launched_again(site: Site, phase: Phase) -> None:
    """The new job has the same name and resumes from the bucket."""
    cloud = Scripted("done")
    cloud.statuses["managed job", NAME] = standing(phase)
    site.submit(cloud)
    assert len(cloud.launched) == 1


def test_a_run_of_this_name_in_another_bucket_is_not_taken_for_it(site: Site) -> None:
    """Following it would leave our bucket empty."""
    cloud = FakeCloud()
    site.submit(cloud, detach=True)
    sent = site.sent()
    assert sent
    submitted.forget(site.state, sent)
    submitted.remember(site.state, sent.model_copy(update={"checkpoints": "gs://other/runs"}))
    with pytest.raises(UserError, match="gs://other/runs") as refused:
        site.submit(cloud)
    assert "--name" in str(refused.value)


def test_a_run_that_is_running_here_is_not_launched_elsewhere(site: Site) -> None:
    """Two attempts would compete for the run, and both would cost money."""
    home = Home.of(site.state, NAME, str(site.runs))
    with home.locked():
        home.remember(
            LocalRecord(
                run_id=NAME,
                recipe="r",
                checkpoints=str(site.runs),
                pid=os.getpid(),
                created=psutil.Process().create_time(),
            )
        )
    cloud = FakeCloud()
    with pytest.raises(UserError, match="already running on this machine"):
        site.submit(cloud)
    assert not cloud.asked


def test_detached_leaves_a_record(site: Site) -> None:
    """`status` reads the record, which contains no secret."""
    ending, _ = site.submit(FakeCloud(), detach=True)
    assert (ending.how, ending.exit_code) == ("detached", 0)
    assert "launcher logs a-run -f" in ending.message
    sent = site.sent()
    assert sent == StartedRun(
        run_id=NAME,
        recipe="zephyr-7b/dpo_full",
        checkpoints=str(site.runs),
        kind="managed job",
        name=NAME,
        job_id=1,
        where="A100:8 spot on gcp",
        usd_per_h=None,
        submitted=1000.0,
    )
    kept = "".join(path.read_text() for path in site.state.rglob("*") if path.is_file())
    assert "hf_0123456789" not in kept


def test_a_launch_that_fails_leaves_no_record(site: Site) -> None:
    """Nothing is rented, so nothing is listed."""
    with pytest.raises(Unavailable, match="no machine"):
        site.submit(Broken("no machine"))
    assert site.sent() is None


def test_a_launch_that_fails_with_its_machine_up_is_remembered(site: Site) -> None:
    """`status` must show a machine that costs money."""
    with pytest.raises(Unavailable, match="set-up"):
        site.submit(Broken("set-up", leaves="cluster"), managed=False)
    assert site.sent()


class Broken(FakeCloud):
    """A cloud whose launches fail; it may leave a cluster behind."""

    def __init__(self, message: str, *, leaves: Kind | None = None) -> None:
        super().__init__()
        self.message = message
        self.leaves = leaves

    def launch(self, *_: Any, **__: Any) -> int:
        if self.leaves:
            self.statuses[self.leaves, NAME] = standing("idle", kind=self.leaves)
        raise Unavailable(self.message)


@pytest.mark.parametrize(
    ("answer", "how", "code"), [("detach", "detached", 0), (None, "detached", 0), ("cancel", "cancelled", 75)]
)
def test_ctrl_c_asks(site: Site, answer: Answer | None, how: str, code: int) -> None:
    """Without a terminal there is no answer, so the run keeps its machine."""
    cloud = Scripted()
    cloud.interrupted = True
    ending, _ = site.submit(cloud, answer=answer)
    assert (ending.how, ending.exit_code) == (how, code)
    assert (f"cancel {NAME}" in cloud.asked) == (answer == "cancel")


def test_ctrl_c_may_have_been_a_slip(site: Site) -> None:
    """The answer `continue` shows the log again."""
    cloud = Scripted("done")
    cloud.interrupted = True
    site.submit(cloud, answer="continue")
    assert cloud.asked.count(f"logs {NAME} -f") == 2


def test_a_log_that_breaks_off_is_taken_up_again(site: Site) -> None:
    """SkyPilot's log stream ends when a machine is lost."""
    cloud = Scripted("recovering", "running", "done")
    site.submit(cloud)
    assert cloud.asked.count(f"logs {NAME} -f") == 3


def test_a_log_that_always_breaks_off_is_left(site: Site) -> None:
    """After several breaks the launcher stops following and leaves the job running."""
    ending, _ = site.submit(FakeCloud())
    assert ending.how == "detached"
    assert "breaks off" in ending.message


@pytest.mark.parametrize(
    ("seen", "end", "how"),
    [
        ("failed", {"kind": "failed", "message": "no key `bta`", "exit_code": 78}, "refused"),
        ("failed", {"kind": "failed", "message": "a bug", "exit_code": 1}, "failed"),
        ("failed", None, "failed"),
        ("cancelled", {"kind": "preempted", "step": 10}, "cancelled"),
        ("failed", {"kind": "superseded", "by": 2}, "superseded"),
        (None, {"kind": "preempted", "step": 10}, "cancelled"),
    ],
)
def test_the_outcome_depends_on_the_bucket_and_on_skypilot(
    site: Site, seen: Phase | None, end: dict[str, Any] | None, how: str
) -> None:
    """A wrong recipe is `refused`; any other failure is `failed`."""
    site.trained(end=end)
    run = Reader(open_run(str(site.runs), NAME), NAME).read()
    assert judge(standing(seen) if seen else None, run) == how


def test_no_line_names_a_secret(site: Site) -> None:
    """Neither a message nor the submission's repr contains a secret."""
    site.submit(FakeCloud(), detach=True)
    order = site.order()
    assert not any("hf_0123456789" in text for text in (*site.said, repr(order), str(order.launch.task)))


def test_an_image_is_made_when_a_machine_is_rented_for_it(site: Site) -> None:
    """It is built before the launch, and not again for a run that is running."""
    site.wishes = BuildOptions(registry="ghcr.io/me", push=True)
    cloud = FakeCloud()
    site.submit(cloud, detach=True)
    site.submit(cloud, detach=True)
    assert site.built == [site.wishes]
    assert len(cloud.launched) == 1


def test_an_image_that_cannot_be_made_rents_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The builder's error is raised, and no record is written."""
    site.wishes = BuildOptions(registry="ghcr.io/me", push=True)
    cloud = FakeCloud()

    def fails(_wishes: BuildOptions) -> None:
        raise UserError("nothing here can build an image")

    monkeypatch.setattr(site, "built", type("Fails", (), {"append": staticmethod(fails)}))
    with pytest.raises(UserError, match="nothing here can build"):
        site.submit(cloud)
    assert not cloud.launched
    assert site.sent() is None
