"""`launcher plan` on the command line: a table for people, JSON for programs, exit codes for scripts."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from launcher.cli import cli
from launcher.prices import store
from trainer.errors import UserError
from trainer.options import DurationParam


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    """A runner whose prices are the shipped ones, a minute old: nobody is asked."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for infra in ("gcp", "lambda"):
        table = store.load_snapshot(infra)
        assert table
        store.write_cache(
            infra, table._replace(taken=datetime.now(UTC)), folder=tmp_path / "aeolus" / "prices"
        )
    return CliRunner()


def plan(run: CliRunner, *words: str) -> Result:
    return run.invoke(cli, ["plan", *words], standalone_mode=False)


def test_no_recipe_is_dpo_full(run: CliRunner) -> None:
    """The main job is planned when nothing is named."""
    result = plan(run, "--json")
    assert result.return_value == 0, result.output
    assert json.loads(result.stdout)["recipe"] == "zephyr-7b/dpo_full"


def test_json_has_every_row_with_its_terms(run: CliRunner) -> None:
    """What a program needs to decide for itself: prices, memory and time term by term, rejections."""
    found = json.loads(plan(run, "--gpus", "A100:8", "--on-demand", "--json").stdout)
    assert found["chosen"] == found["rows"][0]
    row = found["chosen"]
    assert row["offer"]["infra"] == "lambda"
    assert row["fit_words"].startswith("ZeRO-2")
    assert {"name", "gib", "why"} == set(row["fit"]["gpu"]["terms"][0])
    assert {"name", "seconds", "why"} == set(row["estimate"]["terms"][0])
    assert found["prices"].startswith("cache")


def test_the_table_says_what_where_how_and_how_much(run: CliRunner) -> None:
    """One line a machine, the chosen one first, then why."""
    result = plan(run, "dpo_full", "--gpus", "A100-80GB:8")
    lines = result.stdout.splitlines()
    assert lines[0].split()[:4] == ["shape", "where", "market", "fit"]
    assert "gcp/us-" in lines[1]
    assert "ZeRO-2, micro batch" in lines[1]
    assert any(line.startswith("chosen A100-80GB:8 spot on gcp") for line in lines)


def test_rejections_are_told_below(run: CliRunner) -> None:
    """A machine that is too small is named with what it lacks."""
    result = plan(run, "dpo_full", "--all")
    assert "rejected" in result.stdout
    assert "V100:8 (lambda gpu_8x_v100)" in result.stdout


def test_nothing_that_fits_is_exit_code_two_with_the_way_out(run: CliRunner) -> None:
    """A script can stop before anything is rented."""
    result = plan(run, "dpo_full", "--gpus", "L4:1")
    assert isinstance(result.exception, UserError)
    assert "no machine that can be rented fits" in result.exception.message
    assert plan(run, "dpo_full", "--gpus", "L4:1", "--json").return_value == 2


def test_limits_that_nothing_keeps_name_those_that_would(run: CliRunner) -> None:
    """What fits and is only too dear or too slow comes first, and with that limit the nearest of it is chosen."""
    words = ("--gpus", "A100-80GB:8")
    for limits in (("--budget", "5"), ("--deadline", "30m"), ("--budget", "5", "--deadline", "90m")):
        result = plan(run, "dpo_full", *words, *limits)
        assert isinstance(result.exception, UserError)
        assert "options that fit are over the budget or the deadline" in result.exception.message
        assert "over the budget" in result.stdout or "past the deadline" in result.stdout
        raised, named = re.fullmatch(r"`(.*)` would allow (.*)", result.exception.hint or "").groups()  # type: ignore[union-attr]
        given = dict(zip(limits[::2], limits[1::2], strict=True)) | dict([raised.split()])
        assert (
            f"chosen {named}: "
            in plan(run, "dpo_full", *words, *(w for pair in given.items() for w in pair)).stdout
        )


def test_a_data_set_that_nobody_knows_asks_for_its_rows(run: CliRunner) -> None:
    """Hours cannot be told of data of unknown size; the option that mends it is named."""
    data = 'dataset_mixture={"datasets": [{"id": "someone/something"}]}'
    result = plan(run, "dpo_full", data)
    assert isinstance(result.exception, UserError), result.output
    assert "--rows" in str(result.exception.hint)
    counted = plan(run, "dpo_full", data, "--rows", "1000")
    assert "1000 rows, from --rows" in counted.stdout


def test_files_on_this_machine_are_counted(run: CliRunner, tmp_path: Path) -> None:
    """Rows are lines; tokens are guessed from bytes, and it says so."""
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 300)
    result = plan(run, "dpo_full", f"dataset_mixture={data}", "--gpus", "H100:8")
    assert "300 rows of 48 bytes" in result.stdout


@pytest.mark.parametrize(("text", "hours"), [("90m", 1.5), ("24h", 24.0), ("2d", 48.0), ("3", 3.0)])
def test_times_are_read(text: str, hours: float) -> None:
    """Minutes, hours, days; a plain number is hours."""
    assert DurationParam().convert(text, None, None) == hours


@pytest.mark.parametrize("text", ["", "0", "h", "1w", "-3h"])
def test_times_that_cannot_be_are_refused(text: str) -> None:
    """With an example of what can."""
    with pytest.raises(click.BadParameter, match="90m, 24h, 2d"):
        DurationParam().convert(text, None, None)
