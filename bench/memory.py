"""Compare the predicted peaks of training steps with torch's memory tracker, at the width of 7B, with no weight in memory.

    .venv-trainer/bin/python bench/memory.py            # a table for each part, in Markdown; some minutes
    .venv-trainer/bin/python bench/memory.py --case 3   # one case by itself

Fake tensors have shapes and no data, so a step of Mistral-7B runs in little memory, and `MemTracker` adds up what would
be alive. The device is the CPU: what a GPU adds (context, fragmentation, NCCL) is left out on both sides. In TRL's head
the Triton kernels, which work in place, are stood in for by functions that do nothing: its torch code for devices
without Triton takes some 3 GiB more. DeepSpeed does not run on fake tensors; its estimators are compared apart.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from trainer.architecture import Architecture, known_architecture  # noqa: E402
from trainer.memory import GIB, Case, Layout  # noqa: E402
from trainer.memory.usage import list_device_terms  # noqa: E402
from trainer.recipe import DataSource, Mixture, Recipe  # noqa: E402

MODEL = "mistralai/Mistral-7B-v0.1"


class Step(NamedTuple):
    """One case."""

    method: str
    layers: int
    dtype: str
    mixed: bool
    checkpointing: bool
    attention: str
    micro_batch: int
    length: int = 1024
    optim: str = "adamw_torch_fused"
    ranks: int = 1
    """Ranks of FSDP2, of which the first is measured; 1 is a single process."""


CASES = (
    Step("sft", 4, "bfloat16", False, True, "sdpa", 4),
    Step("sft", 4, "bfloat16", False, False, "sdpa", 4),
    Step("sft", 4, "bfloat16", False, False, "eager", 4),
    Step("sft", 4, "bfloat16", False, True, "eager", 4),
    Step("sft", 4, "float32", True, True, "sdpa", 4),
    Step("sft", 4, "float32", True, False, "sdpa", 4),
    Step("dpo", 4, "bfloat16", False, True, "sdpa", 4),
    Step("dpo", 4, "bfloat16", False, False, "sdpa", 4),
    Step("dpo", 4, "float32", True, False, "sdpa", 2),
    Step("sft", 8, "bfloat16", False, False, "sdpa", 8),
    Step("sft", 4, "bfloat16", False, True, "sdpa", 1, 512, "rmsprop"),
    Step("sft", 4, "bfloat16", False, True, "eager", 2, 4096),
    Step("dpo", 32, "bfloat16", False, True, "sdpa", 8),
    Step("sft", 8, "float32", True, True, "sdpa", 2, ranks=8),
    Step("sft", 8, "float32", True, False, "sdpa", 2, ranks=8),
    Step("sft", 32, "float32", True, True, "sdpa", 2, ranks=8),
)


def mistral() -> Architecture:
    found = known_architecture(MODEL)
    if found is None:
        raise LookupError(MODEL)
    return found


def recipe_of(step: Step) -> Recipe:
    return Recipe(
        name="bench",
        method=step.method,  # type: ignore[arg-type]
        model_name_or_path=MODEL,
        dataset_mixture=Mixture(datasets=(DataSource(id="none"),)),
        global_batch_size=step.micro_batch * step.ranks,
        trainer_args={"max_length": step.length, "bf16": step.mixed, "optim": step.optim},
        model_args={"dtype": step.dtype},
    )


def case_of(step: Step) -> Case:
    """Return the predicted case. Only full training, because the tracker does not support frozen weights."""
    whole = mistral()
    architecture = Architecture(**{**whole.model_dump(), "num_hidden_layers": step.layers})
    layout = Layout.model_validate(
        {
            "processes": step.ranks,
            "micro_batch": step.micro_batch,
            "engine": "single" if step.ranks == 1 else "fsdp2",
            "attention": step.attention,
            "activation_checkpointing": step.checkpointing,
            "reference": "model" if step.method == "dpo" else "none",
        }
    )
    return Case.of(recipe_of(step), architecture, layout, has_bf16=step.ranks > 1, on_cpu=True)


def build(step: Step, dtype: Any) -> Any:
    from transformers import MistralConfig, MistralForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    config = MistralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=step.layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        sliding_window=None,
    )
    config._attn_implementation = step.attention  # noqa: SLF001
    import torch

    torch.set_default_dtype(dtype)
    model = MistralForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return model


def optimizer_of(step: Step, model: Any) -> Any:
    import torch

    if step.optim == "rmsprop":
        return torch.optim.RMSprop(model.parameters(), foreach=True)
    if step.ranks > 1:  # of a fused step on parts the tracker counts what is not there
        return torch.optim.AdamW(model.parameters(), foreach=False)
    return torch.optim.AdamW(model.parameters(), fused=True)


def mesh_of(step: Step) -> Any:
    """Set up a process group of this many simulated ranks: communication takes memory and no time."""
    if step.ranks == 1:
        return None
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=step.ranks)
    return init_device_mesh("cpu", (step.ranks,))


def cut(model: Any, mesh: Any) -> Any:
    """Shard the model as Accelerate does (`fsdp2_prepare_model`): each layer, and the embedding. Its third kind of unit, the last norm
    with the head, is the rest here, as the tracker knows none of several modules: both stay gathered until the backward
    pass has passed them.
    """
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    half = torch.bfloat16
    how = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(half, half, half)}
    for each in (*model.model.layers, model.model.embed_tokens):
        fully_shard(each, **how, reshard_after_forward=True)
    return fully_shard(model, **how)


def stand_in_for_triton() -> None:
    """Replace a kernel that needs no memory on a GPU."""
    from trl.kernels import chunked_logprob

    chunked_logprob._forward_tile = lambda *_, **__: None  # noqa: SLF001
    chunked_logprob._backward_tile = lambda *_, **__: None  # noqa: SLF001
    chunked_logprob._addmm_fp32 = lambda *_: None  # noqa: SLF001


def measure(step: Step) -> tuple[float, dict[str, float]]:
    """Return the peak GiB of two steps of two micro batches each, by kind of tensor."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed._tools.mem_tracker import MemTracker

    stand_in_for_triton()
    dtype = torch.float32 if step.dtype == "float32" else torch.bfloat16
    mesh = mesh_of(step)
    with FakeTensorMode():
        model = build(step, dtype).train()
        reference = build(step, dtype).eval() if step.method == "dpo" else None
        if mesh is not None:
            cut(model, mesh)
        if step.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = optimizer_of(step, model)
        rows = step.micro_batch * (2 if reference else 1)
        ids = torch.randint(0, 32000, (rows, step.length))
        if mesh is None:
            tracker = MemTracker()
            tracker.track_external(*(each for each in (model, optimizer, reference, ids) if each is not None))
        else:
            tracker = FSDPMemTracker(model, optimizer)
            tracker.track_inputs((ids,))
        with tracker:
            for turn in range(2):
                one_step(step, model, reference, ids)
                tracker.reset_mod_stats()
                one_step(step, model, reference, ids)
                optimizer.step()
                optimizer.zero_grad()
                if not turn:
                    tracker.reset_mod_stats()
        peak = tracker.get_tracker_snapshot("peak")
    [found] = [values for device, values in peak.items() if str(device) == "cpu"]
    shares = {str(getattr(kind, "value", kind)): size / GIB for kind, size in found.items()}
    return shares.pop("Total"), shares


def one_step(step: Step, model: Any, reference: Any, ids: Any) -> None:
    """Run a micro batch in TRL's order: the policy's forward pass, the reference's, the backward pass."""
    import torch

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=step.mixed and step.ranks == 1):
        output = model(input_ids=ids, labels=ids, fused_lm_head=True)
    loss = output.loss
    if reference is not None:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=step.mixed):
            other = reference(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.sum(-1)
        chosen, rejected = (output.log_probs.sum(-1) - other).chunk(2)
        loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
    loss.backward()


def row(number: int) -> str:
    step = CASES[number]
    started = time.monotonic()
    measured, shares = measure(step)
    terms = {each.name: each.gib for each in list_device_terms(case_of(step)) if each.gib >= 0.005}
    predicted = sum(terms.values())
    kind = f"FSDP2 on {step.ranks}" if step.ranks > 1 else "mixed" if step.mixed else step.dtype
    name = f"{step.method}, {step.layers} layers, {kind}, {step.attention}, {step.optim}"
    name += f", {'checkpointed' if step.checkpointing else 'all kept'}, {step.micro_batch} x {step.length}"
    print(f"  {number}: {terms}\n     {shares}  {time.monotonic() - started:.0f} s", file=sys.stderr)
    return f"| {name} | {measured:.2f} | {predicted:.2f} | {predicted / measured - 1:+.1%} |"


def deepspeed_rows() -> list[str]:
    """Print the model states of 7B on eight GPUs in GiB per GPU, by DeepSpeed's own estimator and by ours."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    whole = mistral()
    rows = []
    for optimizer, parameters in ((False, False), (True, False), (True, True)):
        _, gpu, _ = estimate_zero3_model_states_mem_needs(
            whole.parameters,
            whole.embedding_parameters,
            num_gpus_per_node=8,
            cpu_offload=optimizer,
            cpu_offload_params=parameters,
        )
        layout = Layout(
            processes=8,
            micro_batch=1,
            engine="zero3",
            offload_optimizer=optimizer,
            offload_parameters=parameters,
            attention="sdpa",
            activation_checkpointing=True,
            reference="none",
        )
        recipe = recipe_of(CASES[0]).model_copy(update={"trainer_args": {"bf16": True, "max_length": 1024}})
        terms = {each.name: each.gib for each in list_device_terms(Case.of(recipe, whole, layout))}
        states = sum(terms[name] for name in ("parameters", "gradients", "masters", "optimizer"))
        offload = "all" if parameters else "optimizer" if optimizer else "none"
        rows.append(
            f"| {offload} | {gpu / GIB:.2f} | {states:.2f} | {states + terms['gathered'] + terms['buckets']:.2f} |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", type=int)
    chosen = parser.parse_args().case
    if chosen is not None:
        print(row(chosen))
        return
    print("| step | torch's tracker, GiB | predicted, GiB | |\n|---|---|---|---|")
    for number in range(len(CASES)):
        command = [sys.executable, __file__, "--case", str(number)]
        print(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout, end="", flush=True
        )
    print(
        "\n| offload | DeepSpeed's estimator, GiB | our states, GiB | with gathered parameters and buckets |\n|---|---|---|---|"
    )
    print("\n".join(deepspeed_rows()))


if __name__ == "__main__":
    main()
