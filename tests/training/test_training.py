"""Whole trainings of the smallest model: what they say, save, resume and export."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.jobs import LORA, SMALL, Trained, make_job, train, without_test_data
from trainer.staged import Staged, pending
from trainer.worker.publish_model import consolidate
from trainer.worker.supervisor_channel import Channel

SFT, DPO = "zephyr-tiny/sft", "zephyr-tiny/dpo"
Small = Callable[..., Trained]


@pytest.fixture
def signals() -> Iterator[None]:
    """Puts the signals' handlers back."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def resumed(
    tmp_path: Path, whole: Trained, step: int, name: str, *overrides: str, listens: bool = False
) -> Trained:
    job = make_job(tmp_path / "resumed", name, *SMALL, *overrides, resume_from=whole.checkpoint(step))
    channel = Channel(job)
    if listens:
        channel.listen()
    return train(job, channel)


def model_of(trained: Trained, step: int) -> Path:
    """Return a folder with the model or adapter of a checkpoint, as others read it."""
    folder = trained.job.work / f"model-{step}"
    if not folder.exists():
        consolidate(trained.checkpoint(step), folder)
    return folder


def logits(model: Any, tokenizer_folder: Path) -> torch.Tensor:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(tokenizer_folder)("A hammer is a tool.", return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        return model.eval()(ids).logits  # (1, tokens, vocabulary)


@pytest.mark.parametrize("name", [SFT, DPO])
def test_a_training_says_each_step(small: Small, name: str) -> None:
    """It starts, takes every step with its loss, rate, gradient and samples, and exports."""
    trained = small(name)
    assert trained.outcome.status == "done"
    started = trained.of("started")[0]
    assert (started["step"], started["total_steps"], started["samples"]) == (0, 4, 24)
    assert started["parameters"] == started["trainable_parameters"] > 0
    assert [line["step"] for line in trained.of("step")] == [1, 2, 3, 4]
    wanted = {"loss", "learning_rate", "grad_norm", "samples", "epoch"}
    assert all(wanted <= line.keys() for line in trained.of("step"))
    assert ("rewards/accuracies" in trained.of("step")[0]) == (name == DPO)


def test_steps_say_how_long_they_took_and_what_they_held(small: Small) -> None:
    """Seconds that add up, tokens, the host's peak; evaluations say theirs, and a save its bytes."""
    trained = small(DPO)
    steps = trained.of("step")
    sums = [sum(line["step_s"] for line in steps[: nth + 1]) for nth in range(len(steps))]
    assert [line["train_s"] for line in steps] == pytest.approx(sums)
    assert all(line["tokens_per_s"] > 0 and line["step_s"] > 0 for line in steps)
    assert all(0.05 < line["host_peak_gib"] < 64 for line in steps)
    assert [line["gpu_peak_gib"] is None for line in steps] == [not torch.cuda.is_available()] * len(steps)
    assert all(line["seconds"] > 0 for line in trained.of("eval"))
    saved = trained.of("saved")[0]
    folder = trained.checkpoint(saved["step"])
    assert saved["bytes"] == sum(path.stat().st_size for path in folder.rglob("*"))


def test_checkpoints_are_staged_with_what_they_are_of(small: Small) -> None:
    """Each saved folder has its marker, and both the folder and the marker know data, model and world."""
    trained = small(SFT)
    staged = pending(trained.job.staging)
    assert [(each.folder, each.step, each.kind) for each in staged] == [
        ("checkpoint-2", 2, "checkpoint"),
        ("checkpoint-4", 4, "checkpoint"),
        ("final", 4, "final"),
    ]
    assert [line["step"] for line in trained.of("saved")] == [2, 4]
    details = staged[0].details
    assert {"data", "model", "tokens", "engine", "world_size"} <= details.keys()
    assert json.loads((trained.checkpoint(2) / "aeolus.json").read_text()) == details
    assert all(each.stall_s > 0 for each in staged[:2])


def test_a_checkpoint_is_no_longer_late_in_a_run(small: Small) -> None:
    """What was logged is told to the supervisor: a hundred thousand steps of it would be 48 MB of JSON at every save."""
    state = json.loads((small(SFT).checkpoint(4) / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    assert state["log_history"] == []


def test_samples_are_what_the_model_saw(tmp_path: Path, small: Small) -> None:
    """Two runs alike see the same samples at each step; another seed shows them in another order."""
    again = train(make_job(tmp_path / "again", SFT, *SMALL))
    samples = [[line["samples"] for line in trained.of("step")] for trained in (small(SFT), again)]
    assert samples[0] == samples[1]
    other = small(SFT, "data_seed=1")  # the model stays the same, so nothing but the order differs
    assert all(
        one != two
        for one, two in zip(samples[0], [line["samples"] for line in other.of("step")], strict=True)
    )


def test_evaluations_change_no_samples(small: Small) -> None:
    """Only training is counted, and evaluations are told apart from steps."""
    plain, evaluated = small(DPO), small(DPO, "eval_strategy=steps", "eval_steps=1")
    assert [line["samples"] for line in plain.of("step")] == [
        line["samples"] for line in evaluated.of("step")
    ]
    assert [line["step"] for line in evaluated.of("eval")] == [1, 2, 3, 4]
    assert "eval_rewards/accuracies" in evaluated.of("eval")[0]


@pytest.mark.parametrize("weights", [(), (*LORA, "disable_dropout=false")], ids=["full", "lora"])
def test_a_resumed_dpo_has_the_reference_it_began_with(
    tmp_path: Path, small: Small, weights: tuple[str, ...]
) -> None:
    """Rewards compare with the reference, so equal rewards mean that it is the base, not the checkpoint."""
    whole = small(DPO, *weights)
    again = resumed(tmp_path, whole, 2, DPO, *weights)
    assert again.of("started")[0]["step"] == 2
    assert again.trajectory == whole.trajectory[2:]
    assert abs(again.of("step")[0]["rewards/margins"]) > 1e-4


def test_a_reference_from_the_checkpoint_would_show(tmp_path: Path, small: Small) -> None:
    """The test above can fail: a run that begins at the checkpoint's weights has no rewards at its first step."""
    start = model_of(small(DPO), 2)
    fresh = train(make_job(tmp_path / "fresh", DPO, *SMALL, "init=null", f"model_name_or_path={start}"))
    assert fresh.of("step")[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", [SFT, DPO])
@pytest.mark.parametrize("weights", [(), LORA], ids=["full", "lora"])
def test_a_run_that_lacks_only_its_export_is_exported(
    tmp_path: Path, small: Small, name: str, weights: tuple[str, ...]
) -> None:
    """Killed during the export, the next attempt takes no step and writes the same model."""
    whole = small(name, *weights)
    again = resumed(tmp_path, whole, 4, name, *weights)
    assert again.outcome.status == "done"
    assert again.of("step") == again.of("saved") == []
    assert [each.folder for each in pending(again.job.staging) if each.kind != "reference"] == ["final"]
    assert (again.final / "model.safetensors").read_bytes() == (
        whole.final / "model.safetensors"
    ).read_bytes()


def test_a_last_step_in_the_middle_of_an_epoch_is_the_last(tmp_path: Path, small: Small) -> None:
    """Transformers would train on to the end of the step that it finds itself before."""
    whole = small(SFT, "max_train_samples=40")
    assert whole.of("step")[-1]["epoch"] < 1
    assert resumed(tmp_path, whole, 4, SFT, "max_train_samples=40").of("step") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [("max_train_samples=20", "the training data changed"), ("seed=1", "the base model changed")],
)
def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, small: Small, change: str, message: str
) -> None:
    """The digests of data and base model must be those that the run began with."""
    again = resumed(tmp_path, small(SFT), 2, SFT, change)
    assert again.outcome.status == "user_error"
    assert message in again.outcome.message


def test_another_number_of_threads_is_told(tmp_path: Path, small: Small) -> None:
    """A resume that cannot be exact to the bit goes on, and says so."""
    job = make_job(tmp_path / "resumed", SFT, *SMALL, resume_from=small(SFT).checkpoint(2))
    again = train(job.model_copy(update={"fit": job.fit.model_copy(update={"threads": 2})}))
    assert again.outcome.status == "done"
    assert any("threads changed from 1 to 2" in line["message"] for line in again.of("log"))


@pytest.mark.parametrize(
    ("written", "told"),
    [
        (
            {"device": "NVIDIA A100", "packages": "torch 1"},
            ["device changed from NVIDIA A100", "packages changed from torch 1"],
        ),
        ({"device": "", "packages": ""}, []),
    ],
    ids=["others", "older"],
)
def test_what_rounds_otherwise_is_told(
    tmp_path: Path, small: Small, written: dict[str, str], told: list[str]
) -> None:
    """On another GPU or torch a run goes on, though not to the bit; of what was not written down nothing is said."""
    copy = shutil.copytree(small(SFT).checkpoint(2), tmp_path / "checkpoint-2")
    said = json.loads((copy / "aeolus.json").read_text())
    assert {"torch", "trl"} <= set(said["packages"].replace(",", "").split())
    assert said["device"].startswith("a CPU with")
    (copy / "aeolus.json").write_text(json.dumps({**said, **written}))
    again = train(make_job(tmp_path / "resumed", SFT, *SMALL, resume_from=copy))
    lines = [line["message"] for line in again.of("log") if " changed from " in line["message"]]
    assert [line.partition(" to ")[0] for line in lines] == told


def test_saves_wait_for_the_upload(small: Small) -> None:
    """With two folders still pending a save is skipped and told; the last step is saved all the same."""
    trained = small(SFT, "save_steps=1")
    assert [line["step"] for line in trained.of("saved")] == [1, 2, 4]
    assert [line["step"] for line in trained.of("save_skipped")] == [3]
    assert not trained.checkpoint(3).exists()


def test_skipped_saves_change_no_step(small: Small) -> None:
    """What is saved has no influence on what is trained."""
    assert small(SFT, "save_steps=1").trajectory == small(SFT).trajectory


class StoppedAt(Channel):
    """A machine that gives notice while a step is being told."""

    def __init__(self, job: Any, step: int) -> None:
        super().__init__(job)
        self._step = step

    def say(self, kind: Any, **fields: Any) -> None:
        super().say(kind, **fields)
        if kind == "step" and fields["step"] == self._step:
            os.kill(os.getpid(), signal.SIGTERM)


def stopped(tmp_path: Path, step: int, *overrides: str, name: str = SFT) -> Trained:
    job = make_job(tmp_path / "stopped", name, *SMALL, *overrides)
    channel = StoppedAt(job, step)
    channel.listen()
    return train(job, channel)


@pytest.mark.usefixtures("signals")
def test_a_notice_saves_at_the_next_boundary(tmp_path: Path, small: Small) -> None:
    """SIGTERM during step 1's telling: step 2 is finished, saved and staged, and a resume ends as if undisturbed."""
    trained = stopped(tmp_path, 1, "save_steps=4")
    assert trained.outcome.status == "preempted"
    assert "step 2" in trained.outcome.message
    assert [(each.folder, each.kind) for each in pending(trained.job.staging)] == [
        ("checkpoint-2", "checkpoint")
    ]
    again = resumed(tmp_path, trained, 2, SFT, "save_steps=4")
    assert again.trajectory == small(SFT).trajectory[2:]
    assert (again.final / "model.safetensors").read_bytes() == (
        small(SFT).final / "model.safetensors"
    ).read_bytes()


@pytest.mark.usefixtures("signals")
def test_a_notice_during_a_due_save_needs_no_step_more(tmp_path: Path) -> None:
    """The checkpoint that is being written is the one to stop at."""
    trained = stopped(tmp_path, 2)
    assert trained.outcome.status == "preempted"
    assert [line["step"] for line in trained.of("step")] == [1, 2]
    assert [line["step"] for line in trained.of("saved")] == [2]


@pytest.mark.usefixtures("signals")
def test_a_notice_at_the_last_step_is_too_late(tmp_path: Path) -> None:
    """What is left is the export, so it is finished."""
    trained = stopped(tmp_path, 4)
    assert trained.outcome.status == "done"
    assert (trained.final / "model.safetensors").exists()


def test_a_full_export_is_the_last_checkpoints_model(small: Small) -> None:
    """Same weights, with the tokenizer, its template and the generation settings beside them."""
    trained = small(SFT)
    final, last = (
        load_file(folder / "model.safetensors") for folder in (trained.final, model_of(trained, 4))
    )
    assert final.keys() == last.keys()
    assert all(torch.equal(final[name], last[name]) for name in last)
    beside = {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"}
    assert beside <= {file.name for file in trained.final.iterdir()}
    assert {file.name for file in trained.final.glob("*.safetensors")} == {"model.safetensors"}


def test_an_adapter_names_the_recipes_model(small: Small) -> None:
    """A LoRA export is an adapter that loads over that model and says what the trained one said."""
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    base = small(SFT).final
    trained = small(DPO, "init=null", f"model_name_or_path={base}", *LORA)
    assert json.loads((trained.final / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        base
    )
    over = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), model_of(trained, 4))
    loaded = AutoPeftModelForCausalLM.from_pretrained(trained.final)
    assert torch.equal(logits(loaded, base), logits(over, base))
    assert not torch.equal(logits(loaded, base), logits(AutoModelForCausalLM.from_pretrained(base), base))


def test_an_adapter_of_a_tiny_model_is_merged(small: Small) -> None:
    """Its base lives in the attempt's folder only, so the export is a whole model that says the same."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trained = small(DPO, *LORA)
    base = AutoModelForCausalLM.from_pretrained(trained.job.work / "model")
    over = PeftModel.from_pretrained(base, model_of(trained, 4))
    whole = AutoModelForCausalLM.from_pretrained(trained.final)
    torch.testing.assert_close(logits(whole, trained.final), logits(over, trained.final))


def test_an_sft_model_goes_on_to_dpo(small: Small) -> None:
    """The export of one run is the base of the next: its first step compares the policy with itself."""
    trained = small(DPO, "init=null", f"model_name_or_path={small(SFT).final}")
    assert trained.outcome.status == "done"
    assert trained.of("step")[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert abs(trained.of("step")[-1]["rewards/margins"]) > 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"load_best_model_at_end": True}, "checkpoints are removed from the machine"),
        ({"fp16": True, "bf16": True}, "At most one of fp16 and bf16"),
        ({"optim": "nonsense"}, "nonsense"),
        ({"no_such_setting": 1}, "no_such_setting"),
    ],
)
def test_settings_that_cannot_be_kept_are_the_recipes_fault(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    """What the recipe's own check let through and TRL refuses is the user's to mend, not a bug."""
    job = make_job(tmp_path / "job", SFT, *SMALL)
    recipe = job.recipe.model_copy(update={"trainer_args": {**job.recipe.trainer_args, **settings}})
    trained = train(job.model_copy(update={"recipe": recipe}))
    assert trained.outcome.status == "user_error"
    assert message in trained.outcome.message


def test_an_evaluation_of_nothing_is_refused(tmp_path: Path) -> None:
    """A recipe that wants evaluations needs test rows."""
    job = make_job(tmp_path / "job", SFT, *SMALL, "eval_strategy=steps", "eval_steps=1")
    trained = train(without_test_data(job))
    assert trained.outcome.status == "user_error"
    assert "no test rows" in trained.outcome.message


def test_fewer_processes_than_planned_are_a_bug(tmp_path: Path) -> None:
    """One process where the fit counts on two would train with half the recipe's batch, in silence."""
    job = make_job(tmp_path / "job", SFT, *SMALL)
    with pytest.raises(RuntimeError, match="1 processes were started, not the 2"):
        train(job.model_copy(update={"fit": job.fit.model_copy(update={"processes": 2})}))


def test_markers_are_read_as_the_supervisor_reads_them(small: Small) -> None:
    """Every marker is a `Staged`, beside a folder of its name."""
    trained = small(SFT)
    for marker in trained.job.staging.glob("*.staged"):
        assert (trained.job.staging / Staged.model_validate_json(marker.read_text()).folder).is_dir()
