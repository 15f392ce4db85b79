"""On a real GPU: what the CPU cannot show. Kernels there add in the order of chance unless told otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import RunView, TrainerRun, wait_until
from tests.training.test_exact_resume import LAST_STEP, LORA, RECIPE

torch = pytest.importorskip("torch", reason="the trainer's environment is not here: make setup")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]
QLORA = (
    LORA
    + "load_in_4bit: true\nbnb_4bit_quant_type: nf4\nuse_bnb_nested_quant: true\noptim: paged_adamw_32bit\n"
)
KINDS = {"sft": ("sft", ""), "dpo": ("dpo", ""), "dpo-qlora": ("dpo", QLORA)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_changes_no_bit(kind: str, tmp_path: Path) -> None:
    """In bfloat16, with the attention that the fit chose for this GPU."""
    method, more = KINDS[kind]
    text = RECIPE.format(method=method, data="chats" if method == "sft" else "preferences") + more
    recipe = tmp_path / f"{kind}.yaml"
    recipe.write_text(text.replace("bf16: false", "bf16: true"))
    checkpoints = str(tmp_path / "runs")
    with TrainerRun(recipe, checkpoints, "whole", tmp_path / "work" / "whole") as run:
        assert run.wait() == 0, run.log
    killed = RunView(checkpoints, "killed")
    with TrainerRun(recipe, checkpoints, "killed", tmp_path / "work" / "killed-1") as run:
        wait_until(lambda: killed.committed_steps() or not run.alive, "a commit")
        assert run.alive, run.log
        run.lose_machine()
    with TrainerRun(recipe, checkpoints, "killed", tmp_path / "work" / "killed-2") as run:
        assert run.wait() == 0, run.log

    whole = RunView(checkpoints, "whole")
    assert [event["step"] > 0 for event in killed.events("restored")] == [False, True]
    assert all(event["gpu_peak_gib"] > 0 for event in whole.events("step"))
    told = whole.steps()
    assert sorted(told) == list(range(1, LAST_STEP + 1))
    for step, tellings in killed.steps().items():
        kinds = {event["kind"]: event for event in told[step]}
        assert all(event == kinds[event["kind"]] for event in tellings), f"step {step} diverged"
    final, undisturbed = killed.final(), whole.final()
    assert final is not None
    assert undisturbed is not None
    assert final.weights_digest == undisturbed.weights_digest
