"""Compare the steps and tokens per second of our trainer with TRL's own scripts: `.venv-trainer/bin/python bench/train.py dpo`.

Same model, rows, order of rows, global batch and settings (the alignment-handbook's); each case is a fresh process, the
cases take turns, medians over all rounds. Prints Markdown and writes the loss curves as `bench/train-dpo.png`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import train_inputs
import train_sides
from train_plot import plot
from train_sides import Trained
from train_tables import Case, Measured, losses, overhead, padding, table

HANDBOOK = {
    "dpo": {"beta": 0.01, "loss_type": "sigmoid"},
    "sft": {},
}
"""https://github.com/huggingface/alignment-handbook/tree/f0ffa0d/recipes/zephyr-7b-beta; the settings of both sides are below."""
LORA = {
    "use_peft": True, "load_in_4bit": True, "lora_r": 128, "lora_alpha": 128, "lora_dropout": 0.05,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}  # fmt: skip


def cases(options: argparse.Namespace) -> list[Case]:
    """Return the cases: the handbook's settings first, then one change at a time."""
    kept, recomputed = {"gradient_checkpointing": False}, {"gradient_checkpointing": True}
    second = {"precompute_ref_log_probs": False}
    found = [Case("TRL, the handbook's settings", "trl", recomputed)]
    if options.method == "dpo" and not options.qlora:
        cached = {"precompute_ref_log_probs": True}
        found += [
            Case("TRL, `precompute_ref_log_probs`", "trl", recomputed | cached),
            Case("TRL, the same without checkpointing", "trl", kept | cached),
            Case("ours, a second model as TRL, plain order", "ours", recomputed | second, plain=True),
        ]
    else:
        found += [Case("TRL, without checkpointing", "trl", kept)]
    found += [
        Case("ours, plain order, checkpointing", "ours", recomputed, plain=True),
        Case("ours, by length, checkpointing", "ours", recomputed),
    ]
    if options.device == "cuda":
        return [*found, Case("ours, as the fit has it", "ours", {})]
    return [*found, Case("ours, by length, without checkpointing", "ours", kept)]


def common(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that both sides share. Rows stay in file order, so that losses can be compared."""
    half = options.device == "cuda"
    return {
        **HANDBOOK[options.method],
        **(LORA if options.qlora else {}),
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "optim": "adamw_torch",
        "max_length": options.max_length,
        "max_steps": options.steps,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "bf16": half,
        "dtype": dtype(options),
        "seed": 42,
        **({"attn_implementation": options.attention} if options.attention else {}),
    }


def dtype(options: argparse.Namespace) -> str:
    """Return the dtype of the weights. Fully trained weights are float32 under autocast, as ours always are on one GPU."""
    return "bfloat16" if options.qlora else "float32"


def run(case: Case, options: argparse.Namespace, model: Path, rows: Path, folder: Path) -> Trained:
    settings = {**common(options), "model_name_or_path": str(model), **case.settings}
    if case.side == "trl":
        own = {
            "datasets": [{"path": "json", "data_files": str(rows), "split": "train"}],
            "per_device_train_batch_size": options.micro_batch,
            "gradient_accumulation_steps": options.batch // options.micro_batch,
            "logging_strategy": "steps", "save_steps": options.steps, "eval_strategy": "no", "report_to": "none",
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        }  # fmt: skip
        return train_sides.trl(options.method, settings | own, folder, device=options.device)
    own = {
        "method": options.method,
        "dataset_mixture": {"datasets": [{"id": str(rows)}]},
        "global_batch_size": options.batch,
        "auto_insert_empty_system_msg": False,
        "save_steps": 10**6,
        **({"micro_batch_size": options.micro_batch} if case.plain or options.device == "cpu" else {}),
    }
    return train_sides.ours(settings | own, folder, device=options.device, plain=case.plain)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=["dpo", "sft"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=16, help="global: sequences or pairs")
    parser.add_argument(
        "--micro-batch", type=int, default=4, help="on cuda our side takes the fit's micro batch"
    )
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=60, help="after these no other round is begun")
    parser.add_argument("--tokens", type=int, default=200, help="mean of a generated sequence")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--attention", help="sdpa, eager, flash_attention_2; else each side's own choice")
    parser.add_argument("--qlora", action="store_true", help="4 bits and adapters, as the handbook's (cuda)")
    parser.add_argument("--rows", type=Path, help="JSON Lines to train on instead of generated rows")
    parser.add_argument("--only", help="cases whose name has this")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    if options.qlora and options.device == "cpu":
        parser.error("--qlora is for --device cuda")
    if options.batch % options.micro_batch:
        parser.error(f"--micro-batch {options.micro_batch} does not divide --batch {options.batch}")
    return options


def main() -> None:
    import torch
    import transformers
    import trl

    options = parse()
    found = [Measured(case) for case in cases(options) if not options.only or options.only in case.name]
    loads, began = list[float](), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=options.out) as folder:
        here = Path(folder)
        count = options.batch * options.steps
        data = (
            train_inputs.read(options.rows, count)
            if options.rows
            else train_inputs.rows(options.method, count, tokens=options.tokens)
        )
        rows = train_inputs.write(here / "data", data)
        size = train_inputs.Size(options.hidden, options.layers, options.heads, options.vocab)
        weights = train_inputs.make_model(
            here / "model", data, size, length=options.max_length, dtype=dtype(options)
        )
        for number in range(options.rounds):
            if number and time.perf_counter() - began > 60 * options.minutes:
                break
            for each in found[number % len(found) :] + found[: number % len(found)]:
                each.rounds.append(
                    run(each.case, options, here / "model", rows, here / f"{number}-{found.index(each)}")
                )
                loads.append(os.getloadavg()[0])
                print(f"{loads[-1]:.1f} {each.case.name}: {each.rounds[-1]}", file=sys.stderr, flush=True)
        lengths = train_inputs.lengths(options.method, data, here / "model", options.max_length)
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{os.cpu_count()} CPU cores"
    print(
        f"{options.method}, {weights / 1e6:.1f} M weights ({options.layers} x {options.hidden}), {options.batch} a step in micro "
        f"batches of {options.micro_batch}, {options.steps} steps, {len(found[0].rounds)} rounds; {name}, load {min(loads):.1f}-{max(loads):.1f}; "
        f"{len(os.sched_getaffinity(0))} of them used; torch {torch.__version__}, Transformers {transformers.__version__}, TRL {trl.__version__}\n"
    )
    table(found, options, sum(sum(row) for row in lengths))
    losses(found)
    padding([max(row) for row in lengths], options)
    if any(each.times for case in found for each in case.rounds):
        overhead(found, options)
    curves = {each.case.name: each.rounds[0].losses for each in found}
    plot(curves, options.out / f"train-{options.method}.png")
    print(json.dumps({name: [round(loss, 6) for loss in curve] for name, curve in curves.items()}))


if __name__ == "__main__":
    main()
