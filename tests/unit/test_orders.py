"""Prepared submissions: the plan's choice, and the errors before anything is rented."""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.prices.load import DEFAULT_INFRA
from launcher.prices.offer import Prices, offer_of
from launcher.prices.store import load_snapshot
from launcher.settings import Settings
from launcher.submit.job_files import JOBS, find, names
from launcher.submit.prepare import Submission, SubmitOptions, prepare
from launcher.submit.task import to_yaml
from trainer.errors import BucketError, NoFit, UserError
from trainer.recipe import default_run_id, load

NOW = datetime(2026, 11, 22, tzinfo=UTC)
SECRETS = {"HF_TOKEN": "hf_0123456789", "AWS_ACCESS_KEY_ID": "AKIAKEY", "AWS_SECRET_ACCESS_KEY": "s3cr3t"}
TINY = "zephyr-tiny/dpo"
PIPELINE = "zephyr"
"""Of two tasks, one after the other."""


def shipped(*, infra: tuple[str, ...], **_: object) -> Prices:
    """Return the shipped prices of the given clouds."""
    offers = []
    for name in infra:
        cloud, _slash, region = name.partition("/")
        table = load_snapshot(cloud)
        rows = table.rows if table else ()
        offers += [offer for row in rows if region in ("", row.region) and (offer := offer_of(row))]
    return Prices(offers=tuple(offers), as_of=date(2026, 11, 21), source="snapshot")


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def order(
    source: str | None = None, *overrides: str, environ: dict[str, str] | None = None, **given: Any
) -> Submission:
    wanted = {"checkpoints": "gs://b/runs", **given}
    return prepare(
        SubmitOptions(source=source, overrides=overrides, **wanted),
        environ=environ or {},
        now=NOW,
        prices=shipped,
    )


def test_gpus_alone_are_enough() -> None:
    """`submit --gpus A100:8` chooses the recipe, the place and the layout, and gives reasons."""
    made = order(gpus="A100:8")
    assert made.launch.recipe == "zephyr-7b/dpo_full"
    assert made.launch.task["envs"]["RECIPE"] == "zephyr-7b/dpo_full"
    assert {each["accelerators"] for each in made.launch.task["resources"]["ordered"]} == {"A100:8"}
    assert made.row
    assert "ZeRO-2: DDP needs" in "\n".join(made.reasons)
    assert made.row.describe() in made.reasons[0]


def test_spot_is_a_managed_job_that_saves_as_often_as_the_plan_says() -> None:
    """SkyPilot replaces a lost machine. The plan's save interval does not change the run's id."""
    made = order(gpus="A100-80GB:8", spot=True)
    assert made.launch.kind == "managed job"
    assert made.row
    assert made.launch.task["envs"]["OVERRIDES"] == f"save_steps={made.row.save_steps}"
    assert made.launch.run_id == default_run_id(load("zephyr-7b/dpo_full").recipe)
    assert "autostop" not in made.launch.task["resources"]


def test_the_user_s_own_interval_stands() -> None:
    """The plan's save interval does not override the user's."""
    made = order(None, "save_steps=7", gpus="A100-80GB:8", spot=True)
    assert made.launch.task["envs"]["OVERRIDES"] == "save_steps=7"


def test_on_demand_is_a_cluster_that_goes_down_after_its_work() -> None:
    """It needs no recovery, and it goes down when it is idle."""
    made = order(gpus="A100-80GB:8", spot=False)
    assert made.launch.kind == "cluster"
    assert made.launch.task["resources"]["autostop"]["down"] is True
    listed = made.launch.task["resources"]["ordered"]
    assert {each["use_spot"] for each in listed} == {False}


def test_what_cannot_fit_is_refused_with_what_would() -> None:
    """The error has the plan's reasons and a hint."""
    with pytest.raises(NoFit, match="L4:1") as refused:
        order(gpus="L4:1")
    assert refused.value.hint


def test_a_budget_that_nothing_meets_is_refused() -> None:
    """Without `--budget`, the budget of the settings applies."""
    with pytest.raises(NoFit, match="over the budget of \\$1"):
        order(gpus="A100-80GB:8", environ={"AEOLUS_BUDGET": "1"})


@pytest.mark.parametrize("checkpoints", ["runs", "/shared/runs", "file:///runs"])
def test_a_folder_of_this_machine_is_refused(checkpoints: str) -> None:
    """Nodes cannot reach it; the hint names a bucket."""
    with pytest.raises(BucketError, match="folder of this machine") as refused:
        order(checkpoints=checkpoints, gpus="A100:8")
    assert "--checkpoints gs://" in str(refused.value)


def test_a_store_on_this_machine_is_refused_for_rented_ones_alone() -> None:
    """The user's own cluster may be able to reach it."""
    environ = {**SECRETS, "AWS_ENDPOINT_URL": "http://127.0.0.1:9000"}
    with pytest.raises(BucketError, match="on this machine, which gcp"):
        order(checkpoints="s3://b/runs", gpus="A100:8", environ=environ)
    made = order(TINY, checkpoints="s3://b/runs", gpus="A100:8", infra=("slurm",), environ=environ)
    assert made.launch.secrets["AWS_ENDPOINT_URL"] == "http://127.0.0.1:9000"


def test_slurm_takes_gpus_and_has_neither_prices_nor_spot() -> None:
    """On the user's own machines nothing is ranked."""
    environ = {"AEOLUS_NODE_PYTHON": "/opt/python", "AEOLUS_IMAGE": "registry/image"}
    made = order(TINY, gpus="A100:8", infra=("slurm/lab",), managed=True, environ=environ)
    resources = made.launch.task["resources"]
    assert (resources["infra"], resources["accelerators"]) == ("slurm/lab", "A100:8")
    assert not {"use_spot", "image_id", "autostop", "instance_type"} & set(resources)
    assert made.launch.task["envs"]["AEOLUS_TRAINER_PYTHON"] == "/opt/python"
    assert made.launch.kind == "managed job"
    assert made.row is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"infra": ("slurm",)}, "which GPUs of slurm"),
        ({"infra": ("slurm",), "gpus": "A100:8", "spot": True}, "has no spot"),
        ({"infra": ("slurm",), "gpus": "A100:8", "budget_usd": 5.0}, "no price is known for slurm"),
        ({"infra": ("slurm", "gcp"), "gpus": "A100:8"}, "name one kind"),
        ({"infra": ("slurm",), "gpus": "A100:8", "name": "a/b"}, "cannot name a run"),
        ({"gpus": "A100:9"}, "9 x A100"),
    ],
)
def test_impossible_options_are_refused(given: dict[str, Any], said: str) -> None:
    """Each error has a hint."""
    with pytest.raises(UserError) as refused:
        order(TINY, **given)
    assert said in str(refused.value)


def test_what_cannot_fit_one_s_own_gpus_is_refused_too() -> None:
    """A run that cannot start is refused before it waits in a queue."""
    with pytest.raises(NoFit, match="T4"):
        order(gpus="T4:1", infra=("slurm",))


def test_secrets_go_by_name_and_only_where_they_are_needed() -> None:
    """No file and no log has the values. Amazon's keys are passed on for S3 buckets only."""
    made = order(gpus="A100:8", environ=SECRETS)
    assert made.launch.secrets == {"HF_TOKEN": SECRETS["HF_TOKEN"]}
    assert made.launch.task["secrets"] == {"HF_TOKEN": None}
    s3 = order(gpus="A100:8", checkpoints="s3://b/runs", environ={**SECRETS, "AWS_REGION": "eu-west-1"})
    assert set(s3.launch.secrets) == {*SECRETS, "AWS_REGION"}
    for each in (made, s3):
        shown = f"{each!r} {to_yaml(each.launch.task)} {each.reasons}"
        assert not any(value in shown for value in SECRETS.values())


def test_who_has_logged_in_to_the_hub_needs_no_variable(tmp_path: Path) -> None:
    """The token of the login is passed on, so that a gated model loads. The variable overrides it."""
    (tmp_path / "token").write_text("hf_fromthelogin\n")
    logged_in = {"HF_HOME": str(tmp_path)}
    made = order(gpus="A100:8", environ=logged_in)
    assert made.launch.secrets == {"HF_TOKEN": "hf_fromthelogin"}
    assert "fromthelogin" not in to_yaml(made.launch.task)
    assert order(gpus="A100:8", environ={**logged_in, "HF_TOKEN": "hf_ours"}).launch.secrets == {
        "HF_TOKEN": "hf_ours"
    }
    assert order(gpus="A100:8", environ={"HF_HOME": str(tmp_path / "none")}).launch.secrets == {}


def test_a_recipe_file_goes_along_under_its_folder_s_name(tmp_path: Path) -> None:
    """The node's copy has the same folder name, so the recipe has the same name."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "dpo.yaml").write_text((Path("jobs/recipes") / f"{TINY}.yaml").read_text())
    made = order(str(folder / "dpo.yaml"), gpus="A100:8", infra=("slurm",))
    there = "~/.aeolus/mine/dpo.yaml"
    assert made.launch.task["envs"]["RECIPE"] == there
    assert made.launch.task["file_mounts"] == {there: str(folder / "dpo.yaml")}
    assert made.launch.recipe == "mine/dpo"


def test_data_of_this_machine_goes_along_to_rented_ones(tmp_path: Path) -> None:
    """Each file is copied once and keeps its name. Overrides name the copies."""
    pairs, tests = tmp_path / "mine" / "pairs.jsonl", tmp_path / "other" / "pairs.jsonl"
    for path in (pairs, tests):
        path.parent.mkdir()
        path.write_text("{}\n")
    made = order(
        "zephyr-7b/dpo_full", f"dataset_mixture={pairs}", f"test_dataset=[{tests},{pairs}]", gpus="A100:8"
    )
    there = ["~/.aeolus/data/0/pairs.jsonl", "~/.aeolus/data/1/pairs.jsonl"]
    assert made.launch.task["file_mounts"] == {there[0]: str(pairs), there[1]: str(tests)}
    handed_on = str(made.launch.task["envs"]["OVERRIDES"]).split()
    assert [word for word in handed_on if word.startswith("dataset_mixture.")] == [
        f"dataset_mixture.datasets.0.id={there[0]}",
        f"dataset_mixture.test_datasets.0.id={there[1]}",
        f"dataset_mixture.test_datasets.1.id={there[0]}",
    ]


@pytest.mark.parametrize(("infra", "copied"), [("slurm", False), ("kubernetes", True), ("k8s", True)])
def test_pods_get_the_data_and_a_cluster_that_may_share_it_does_not(
    tmp_path: Path, infra: str, copied: bool
) -> None:
    """A pod has no access to this machine's files; a Slurm cluster often shares the file system."""
    data = tmp_path / "pairs.jsonl"
    data.write_text("{}\n")
    made = order("zephyr-7b/dpo_full", f"dataset_mixture={data}", gpus="A100:8", infra=(infra,))
    assert ("file_mounts" in made.launch.task) == copied


def test_the_node_reads_the_copied_data_as_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the copies in the node's home folder, the recipe has the same digest."""
    monkeypatch.setenv("HOME", str(tmp_path / "node"))
    folder = tmp_path / "my project"
    folder.mkdir()
    (folder / "pairs.jsonl").write_text("{}\n")
    (folder / "dpo.yaml").write_text("model_name_or_path: Qwen/Qwen2.5-7B\ndataset_mixture: pairs.jsonl\n"
                                     "global_batch_size: 64\n")  # fmt: skip
    made = order(str(folder / "dpo.yaml"), gpus="A100:8")
    for there, here in made.launch.task["file_mounts"].items():
        copy = Path(there).expanduser()
        copy.parent.mkdir(parents=True)
        copy.write_text(Path(here).read_text())
    envs = made.launch.task["envs"]
    read = load(envs["RECIPE"], str(envs["OVERRIDES"]).split()).recipe
    assert read.dataset_mixture.datasets[0].id == str(tmp_path / "node/.aeolus/data/0/pairs.jsonl")
    assert read.digest() == load(folder / "dpo.yaml").recipe.digest()


def test_a_folder_with_blanks_leaves_none_in_what_the_node_s_shell_reads(tmp_path: Path) -> None:
    """SkyPilot creates a copy's folder without quotes, and accepts no blank in a name."""
    folder = tmp_path / "my project (2)"
    folder.mkdir()
    (folder / "dpo.yaml").write_text((Path("jobs/recipes") / f"{TINY}.yaml").read_text())
    made = order(str(folder / "dpo.yaml"), gpus="A100:8", infra=("slurm",))
    assert made.launch.task["envs"]["RECIPE"] == "~/.aeolus/my-project-2-/dpo.yaml"
    assert made.launch.task["file_mounts"] == {"~/.aeolus/my-project-2-/dpo.yaml": str(folder / "dpo.yaml")}
    assert str(made.launch.task["name"]).startswith("my-project-2-dpo-")


def test_data_whose_name_would_not_arrive_is_refused(tmp_path: Path) -> None:
    """The error comes before a machine is rented."""
    (tmp_path / "my pairs.jsonl").write_text("{}\n")
    recipe = tmp_path / "dpo.yaml"
    recipe.write_text(
        "model_name_or_path: Qwen/Qwen2.5-7B\ndataset_mixture: my pairs.jsonl\nglobal_batch_size: 64\n"
    )
    with pytest.raises(
        UserError, match=r"my pairs\.jsonl: this file name cannot be passed to a node unchanged"
    ):
        order(str(recipe), gpus="A100:8")


def test_a_model_of_this_machine_is_not_sent_to_rented_ones(tmp_path: Path) -> None:
    """The run would fail on the rented machine."""
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    with pytest.raises(UserError, match="is on this machine only"):
        order("zephyr-7b/dpo_full", f"model_name_or_path={tmp_path}", gpus="A100:8")


def test_a_task_for_one_kind_of_gpu_is_planned_for_that(tmp_path: Path) -> None:
    """The GPUs of a user's task file restrict the plan."""
    task = yaml.safe_load((JOBS / "dpo_full_offload.yaml").read_text())
    task["resources"]["ordered"] = [{"infra": "gcp", "accelerators": "A100:8"}, {"accelerators": "A100:8"}]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(task))
    made = order(str(path))
    assert {each["accelerators"] for each in made.launch.task["resources"]["ordered"]} == {"A100:8"}
    assert made.launch.recipe == "notus-7b/dpo_full"


@pytest.mark.parametrize("name", [name for name in names() if name != PIPELINE])
def test_every_task_can_be_submitted_by_its_name(name: str) -> None:
    """The task keeps its recipe and its scripts."""
    made = order(name)
    base = find(name).base
    assert made.launch.task["envs"]["RECIPE"] == base["envs"]["RECIPE"]
    assert (made.launch.task["setup"], made.launch.task["run"]) == (base["setup"], base["run"])
    assert made.launch.task["resources"]["job_recovery"] == {"recover_on_exit_codes": [75]}
    assert made.launch.task.get("num_nodes", 1) == base.get("num_nodes", 1)


def test_a_pipeline_is_launched_by_hand() -> None:
    """Each part of a pipeline is a separate run; the hint has SkyPilot's command."""
    with pytest.raises(UserError, match="one at a time") as refused:
        order(PIPELINE)
    assert "sky jobs launch" in str(refused.value)


def test_the_settings_look_where_the_plan_looks() -> None:
    """The two defaults are equal."""
    assert Settings().infra == DEFAULT_INFRA
