"""`launcher plan` on the command line: a table, JSON, and exit codes."""

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
    """A runner whose cache has the shipped prices with the current time, so that SkyPilot is not asked."""
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
    """Without a recipe, `zephyr-7b/dpo_full` is planned."""
    result = plan(run, "--json")
    assert result.return_value == 0, result.output
    assert json.loads(result.stdout)["recipe"] == "zephyr-7b/dpo_full"


def test_json_has_every_row_with_its_terms(run: CliRunner) -> None:
    """The JSON has prices, every term of memory and time, and the rejections."""
    found = json.loads(plan(run, "--gpus", "A100:8", "--on-demand", "--json").stdout)
    assert found["chosen"] == found["rows"][0]
    row = found["chosen"]
    assert row["offer"]["infra"] == "lambda"
    assert row["fit_words"].startswith("ZeRO-2")
    assert {"name", "gib", "why"} == set(row["fit"]["gpu"]["terms"][0])
    assert {"name", "seconds", "why"} == set(row["estimate"]["terms"][0])
    assert found["prices"].startswith("cache")


def test_the_table_has_shape_place_fit_and_cost(run: CliRunner) -> None:
    """The table has one line per option, the chosen one first, and then the reason."""
    result = plan(run, "dpo_full", "--gpus", "A100-80GB:8")
    lines = result.stdout.splitlines()
    assert lines[0].split()[:4] == ["shape", "where", "market", "fit"]
    assert "gcp/us-" in lines[1]
    assert "ZeRO-2, micro batch" in lines[1]
    assert any(line.startswith("chosen A100-80GB:8 spot on gcp") for line in lines)


def test_rejections_are_listed_below(run: CliRunner) -> None:
    """A machine that is too small is listed below the table, with the reason."""
    result = plan(run, "dpo_full", "--all")
    assert "rejected" in result.stdout
    assert "V100:8 (lambda gpu_8x_v100)" in result.stdout


def test_nothing_that_fits_is_exit_code_two_with_the_way_out(run: CliRunner) -> None:
    """If nothing fits, the exit code is 2, so that a script can stop."""
    result = plan(run, "dpo_full", "--gpus", "L4:1")
    assert isinstance(result.exception, UserError)
    assert "no machine that can be rented fits" in result.exception.message
    assert plan(run, "dpo_full", "--gpus", "L4:1", "--json").return_value == 2


def test_limits_that_reject_all_options_name_limits_that_would_do(run: CliRunner) -> None:
    """If only the limits reject all options, the hint has a limit with which the nearest option is chosen."""
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


def test_a_data_set_of_unknown_size_asks_for_its_rows(run: CliRunner) -> None:
    """For a data set of unknown size, the error names `--rows`."""
    data = 'dataset_mixture={"datasets": [{"id": "someone/something"}]}'
    result = plan(run, "dpo_full", data)
    assert isinstance(result.exception, UserError), result.output
    assert "--rows" in str(result.exception.hint)
    counted = plan(run, "dpo_full", data, "--rows", "1000")
    assert "1000 rows, from --rows" in counted.stdout


def test_files_on_this_machine_are_counted(run: CliRunner, tmp_path: Path) -> None:
    """Rows of a local file are its lines; tokens are estimated from its bytes."""
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 300)
    result = plan(run, "dpo_full", f"dataset_mixture={data}", "--gpus", "H100:8")
    assert "300 rows of 48 bytes" in result.stdout


@pytest.mark.parametrize(("text", "hours"), [("90m", 1.5), ("24h", 24.0), ("2d", 48.0), ("3", 3.0)])
def test_times_are_read(text: str, hours: float) -> None:
    """Durations are read in minutes, hours and days; a plain number is hours."""
    assert DurationParam().convert(text, None, None) == hours


@pytest.mark.parametrize("text", ["", "0", "h", "1w", "-3h"])
def test_times_that_cannot_be_are_refused(text: str) -> None:
    """An invalid duration is an error with examples of valid ones."""
    with pytest.raises(click.BadParameter, match="90m, 24h, 2d"):
        DurationParam().convert(text, None, None)
