"""The summary of a run: its facts, its picture, and how numbers are printed."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from launcher.render import change, duration, facts_table, list_table, size, to_json
from launcher.runs.run import AttemptHistory, RunHistory
from launcher.runs.summary import draw, picture_path, summary
from tests.fakes.runs import BEGIN, attempt_events
from trainer.events import Event


def a_run(
    *spans: tuple[int, int], method: str = "dpo", finished: str | None = BEGIN.isoformat()
) -> RunHistory:
    """Return a run of 40 steps whose attempts took these spans of steps."""
    end: Event = {"kind": "exported", "step": 40, "bytes": 2048, "weights_digest": "abcd"}
    attempts = [
        AttemptHistory(
            number,
            tuple(
                attempt_events(
                    number,
                    start=start,
                    last=last,
                    total_steps=40,
                    method=method,
                    end=end if last == 40 else None,
                )
            ),
        )
        for number, (start, last) in enumerate(spans, 1)
    ]
    return RunHistory("a-run", "/runs/a-run", tuple(attempts), (10, 20, 30, 40), finished)


def test_the_facts_of_a_preempted_run() -> None:
    """Attempts, lost steps, and first and last metrics come from the events."""
    facts = summary(a_run((0, 14), (10, 27), (20, 40)))
    assert (facts.state, facts.attempts, facts.preemptions, facts.restores) == ("done", 3, 2, 2)
    assert (facts.step, facts.total_steps, facts.lost_steps, facts.commits) == (40, 40, 4 + 7, 4)
    assert facts.train_loss == (1 / 1 + 1, 1 / 40 + 3)
    assert facts.test == (0.1, 0.4)
    assert (facts.final, facts.final_bytes, facts.weights_digest) == ("/runs/a-run/final", 2048, "abcd")


def test_dollars_are_shown_if_a_price_is_known() -> None:
    """An attempt without a price uses the given one. Without any price, there is no row for dollars."""
    run = a_run((0, 14))
    assert "dollars" not in dict(summary(run).rows())
    seconds = run.attempts[0].ended - run.attempts[0].began
    facts = summary(run, usd_per_h=7200.0)
    assert facts.usd == pytest.approx(2 * seconds)
    assert dict(facts.rows())["dollars"] == f"${2 * seconds:.2f}"


def test_the_test_metric_of_sft_is_the_loss() -> None:
    """SFT has no rewards."""
    facts = summary(a_run((0, 40), method="sft"))
    assert (facts.test_metric, facts.test) == ("eval_loss", (1 / 10, 1 / 40))


def test_an_unfinished_run_has_no_final_model() -> None:
    """The final model is shown as `not yet`."""
    facts = summary(a_run((0, 14), finished=None))
    assert facts.final is None
    assert dict(facts.rows())["final model"] == "not yet"


def test_a_run_without_steps_has_a_summary() -> None:
    """Its metrics are None."""
    facts = summary(RunHistory("a-run", "/runs/a-run", (), ()))
    assert (facts.train_loss, facts.test, facts.state) == (None, None, "new")
    assert facts_table(facts.rows(), title="a-run").row_count == len(facts.rows())


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_the_picture_is_a_png(tmp_path: Path, method: str) -> None:
    """Missing folders of its path are created."""
    path = tmp_path / "new" / "report.png"
    draw(a_run((0, 14), (10, 27), (20, 40), method=method), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_picture_shows_preemptions(tmp_path: Path) -> None:
    """Two runs with the same curves and other attempts look different."""
    draw(a_run((0, 40)), tmp_path / "whole.png")
    draw(a_run((0, 14), (10, 40)), tmp_path / "preempted.png")
    assert (tmp_path / "whole.png").read_bytes() != (tmp_path / "preempted.png").read_bytes()


def test_the_picture_is_in_the_run_s_folder() -> None:
    """For a run in a bucket, the picture goes to this machine's state folder."""
    home = Path("/home/state/a-run")
    assert picture_path("/runs", "a-run", home=home) == Path("/runs/a-run/report.png")
    assert picture_path("gs://bucket/runs", "a-run", home=home) == home / "report.png"


def test_durations_and_sizes_have_units() -> None:
    """The unit depends on the size, and no value is printed as 60 of a unit."""
    assert [duration(s) for s in (0.24, 59.6, 60, 185, 3599.7, 7810)] == [
        "0.2 s", "1 min 00 s", "1 min 00 s", "3 min 05 s", "1 h 00 min", "2 h 10 min",
    ]  # fmt: skip
    assert [size(count) for count in (512, 1536, 5 << 20, 3 << 30)] == [
        "512 B",
        "1.5 KiB",
        "5.0 MiB",
        "3.0 GiB",
    ]
    assert change((0.69314, 0.41)) == "0.6931 → 0.4100"


def test_the_name_of_a_run_is_not_wrapped() -> None:
    """A narrow terminal wraps other columns first, so that the name can be copied."""
    name = "zephyr-tiny-dpo-111a6221"
    console = Console(width=60, file=io.StringIO())
    with console.capture() as captured:
        console.print(
            list_table(
                ("run", "where", "last commit", "attempts", "$ so far"), [(name, "this machine", *"123")]
            )
        )
    assert name in captured.get()


def test_json_is_strict() -> None:
    """NaN and infinity become null, which every JSON reader accepts."""
    assert (
        to_json({"loss": [float("nan"), 1.5], "of": {"inf": float("inf")}})
        == '{"loss": [null, 1.5], "of": {"inf": null}}'
    )
