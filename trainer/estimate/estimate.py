"""How long a recipe trains on a shape: every second of a step, with its reason.

Left out because it hides behind the GPU: reading and tokenising rows, logging, and uploads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from trainer.architecture import Architecture
from trainer.estimate import batch as batches
from trainer.estimate import checkpoint as checkpoints
from trainer.estimate import traffic
from trainer.estimate.arithmetic import BACKWARD_ATTENTION, HALF, Pass, StepInputs, one_pass
from trainer.estimate.batch import MicroBatch
from trainer.estimate.efficiency import TRANSFORMERS, TRANSFORMERS_4BIT, Stack
from trainer.estimate.machine import Machine, machine
from trainer.estimate.result import SAVES, Estimate, StepTerm
from trainer.estimate.workload import Workload
from trainer.hardware import Gpu, Shape, gpu_of
from trainer.hardware import gpu as named_gpu
from trainer.memory import Layout
from trainer.recipe import Recipe
from trainer.recipe.model import may_sort

EVAL_BATCH = 8
"""`per_device_eval_batch_size` of TrainingArguments."""
STAND_IN = named_gpu("A100")
LOGIT_BYTES = 30
"""Of each logit of the policy, through memory: bf16, fp32, softmax and their gradients; by counting TRL's losses."""


def estimate(  # noqa: PLR0913 - five things decide, and five are for those who know more
    recipe: Recipe,
    architecture: Architecture,
    fit: Layout,
    shape: Shape,
    workload: Workload,
    *,
    gpu: Gpu | None = None,
    network_gbps: float | None = None,
    rates: checkpoints.Rates | None = None,
    stack: Stack | None = None,
    in_order: bool | None = None,
) -> Estimate:
    """Time of a recipe under a fit (any layout) on a shape.

    Args:
        recipe: what is trained.
        architecture: of its model.
        fit: how it lies on the machines.
        shape: the machines.
        workload: rows and tokens.
        gpu: in place of the table's.
        network_gbps: GB/s of a node's network, where it is known.
        rates: of bucket and Hub, where they are known.
        stack: other software than Transformers, for comparisons.
        in_order: whether a global batch is dealt by length; if None, as we do where the loss allows it.

    Raises:
        UserError: the shape's GPU is not in the table, and no `gpu` is given.
    """
    run = _run(recipe, architecture, fit, machine(shape, gpu or _board(shape), network_gbps), stack)
    micro, total = _micro(run, workload, in_order=in_order), batches.steps(recipe, workload)
    terms = tuple(each for each in _terms(run, micro, total, workload) if each.seconds)
    known = rates or checkpoints.Rates()
    return Estimate(
        steps=total,
        step_s=sum(each.seconds for each in terms),
        load_s=checkpoints.load_s(run, known),
        once_s=_once(run, micro, workload),
        checkpoint_bytes=checkpoints.checkpoint_bytes(run),
        restore_s=checkpoints.restore_s(run, known),
        save_s=checkpoints.save_s(run),
        upload_s=checkpoints.upload_s(run, known),
        tokens=round(micro.real * micro.accumulation * micro.processes),
        terms=terms,
    )


def step_s(
    recipe: Recipe, architecture: Architecture, layout: Layout, shape: Shape, workload: Workload
) -> float:
    """Seconds of an optimizer step by itself, without what happens now and then: by them a fit is chosen.

    A GPU outside the table is taken for an A100: it is the relation of arithmetic to traffic that decides.
    """
    run = _run(recipe, architecture, layout, machine(shape, gpu_of(shape) or STAND_IN, None))
    return sum(each.seconds for each in _step(run, _micro(run, workload)))


def _run(
    recipe: Recipe, architecture: Architecture, layout: Layout, on: Machine, stack: Stack | None = None
) -> StepInputs:
    usual = TRANSFORMERS_4BIT if recipe.quantised_bits == 4 else TRANSFORMERS
    return StepInputs(
        recipe=recipe, architecture=architecture, layout=layout, machine=on, stack=stack or usual
    )


def _micro(run: StepInputs, workload: Workload, *, in_order: bool | None = None) -> MicroBatch:
    ordered = may_sort(run.recipe) if in_order is None else in_order
    return batches.batch(run.recipe, run.layout, workload, in_order=ordered)


def _board(shape: Shape) -> Gpu | None:
    return gpu_of(shape) or (named_gpu(shape.accelerator) if shape.accelerator else None)


def _terms(run: StepInputs, micro: MicroBatch, total: int, workload: Workload) -> Iterator[StepTerm]:
    yield from _step(run, micro)
    yield from _now_and_then(run, total, workload)


def _step(run: StepInputs, micro: MicroBatch) -> Iterator[StepTerm]:
    arithmetic = list(_arithmetic(run, micro))
    yield from arithmetic
    yield from _moving(run, micro.accumulation, sum(each.seconds for each in arithmetic))


def _arithmetic(run: StepInputs, micro: MicroBatch) -> Iterator[StepTerm]:
    each, count = one_pass(run, micro), micro.accumulation
    size = f"{count} x {micro.sequences} sequences of {micro.length:.0f} tokens"
    yield StepTerm(name="forward", seconds=count * each.seconds(), why=f"{size}; {_rates(run)}")
    if run.layout.activation_checkpointing:
        yield StepTerm(
            name="recomputation", seconds=count * each.seconds(), why="each layer's forward pass again"
        )
    yield StepTerm(name="backward", seconds=count * _backward(run, each), why=_why_backward(run))
    if traffic.has_reference_pass(run):
        other = one_pass(run, micro, adapted=False).seconds()
        yield StepTerm(name="reference", seconds=count * other, why=f"a forward pass: {run.layout.reference}")
    loss = LOGIT_BYTES * run.architecture.vocab_size * micro.tokens / run.machine.memory
    yield StepTerm(name="loss", seconds=count * loss, why=f"{run.architecture.vocab_size} logits a token")


def _backward(run: StepInputs, each: Pass) -> float:
    products = 1.0 if run.recipe.is_lora else 2.0
    attentions = 2.0 if run.layout.attention == "eager" else BACKWARD_ATTENTION
    return each.seconds(matmuls=products, attentions=attentions, memories=2.0)


def _why_backward(run: StepInputs) -> str:
    if run.recipe.is_lora:
        return "gradients of inputs only: the weights are frozen"
    return "gradients of inputs and of weights: twice the forward pass"


def _rates(run: StepInputs) -> str:
    unsure = "" if run.machine.measured else ", which no published run has checked"
    model = f"{run.architecture.parameters / 1e9:.2f} B parameters"
    return f"{model} at {run.machine.flops / 1e12:.0f} TFLOP/s of {run.machine.name}{unsure}"


def _moving(run: StepInputs, accumulation: int, compute_s: float) -> Iterator[StepTerm]:
    between = traffic.between_gpus(run, accumulation)
    yield StepTerm(
        name="traffic between GPUs",
        seconds=traffic.exposed(between, compute_s),
        why=f"{run.layout.engine} over {run.layout.processes} processes, {run.layout.nodes} node{'s' if run.layout.nodes > 1 else ''}",
    )
    gather = traffic.parameters_from_host(run, accumulation)
    yield StepTerm(
        name="parameters from host",
        seconds=gather,
        why=f"{traffic.gathers(run)} gathers a micro batch over PCIe",
    )
    down = traffic.gradients_to_host(run, accumulation)
    yield StepTerm(name="gradients to host", seconds=down, why="over PCIe, a shard a process")
    where = "on the host's CPUs" if run.layout.offload_optimizer else "on the GPU"
    yield StepTerm(
        name="optimizer", seconds=traffic.optimizer_step(run), why=f"{traffic.optimizer(run)} {where}"
    )


def _now_and_then(run: StepInputs, total: int, workload: Workload) -> Iterator[StepTerm]:
    evaluations = batches.evaluations(run.recipe, total)
    if workload.test_rows and evaluations:
        seconds = evaluations * _evaluation(run, workload)
        why = f"{evaluations} times {workload.test_rows} rows, {seconds / evaluations:.0f} s each"
        yield StepTerm(name="evaluation", seconds=seconds / total, why=why)
    saves, stall = batches.saves(run.recipe, total), checkpoints.save_s(run)
    yield StepTerm(
        name=SAVES, seconds=saves * stall / total, why=f"{saves} times {stall:.2f} s; uploads run beside"
    )


def _evaluation(run: StepInputs, workload: Workload) -> float:
    each = int(run.recipe.trainer_args.get("per_device_eval_batch_size") or EVAL_BATCH)
    layout = run.layout.model_copy(update={"micro_batch": each})
    micro = batches.batch(run.recipe, layout, workload, in_order=False)
    full = batches.rows(run.recipe, workload.model_copy(update={"rows": workload.test_rows}))
    passes = math.ceil(full / (each * run.layout.processes))
    seconds = _forward_only(run, micro)
    if run.layout.shards_parameters:
        gathers = traffic.gathers(run) - 1  # none for a backward pass
        between = gathers * traffic.collective(run, HALF * run.architecture.parameters)
        seconds += traffic.exposed(between, seconds)
        seconds += traffic.parameters_from_host(run, 1) * gathers / traffic.gathers(run)
    return passes * seconds


def _forward_only(run: StepInputs, micro: MicroBatch) -> float:
    policy = one_pass(run, micro).seconds()
    return policy + (
        one_pass(run, micro, adapted=False).seconds() if traffic.has_reference_pass(run) else 0.0
    )


def _once(run: StepInputs, micro: MicroBatch, workload: Workload) -> float:
    """The reference's pass over every row that training sees, and over the tests; sorted, they are hardly padded."""
    if run.layout.reference != "precomputed":
        return 0.0
    seen = min(workload.rows, batches.steps(run.recipe, workload) * run.recipe.global_batch_size)
    sorted_ = micro.of_length(math.ceil(micro.real / micro.sequences))
    passes = math.ceil((seen + _tested(run, workload)) / (run.layout.micro_batch * run.layout.processes))
    seconds = one_pass(run, sorted_, adapted=False).seconds()
    return passes * (seconds + _gathered(run, seconds))


def _tested(run: StepInputs, workload: Workload) -> int:
    """Rows that evaluations need the reference of."""
    return workload.test_rows if batches.evaluations(run.recipe, batches.steps(run.recipe, workload)) else 0


def _gathered(run: StepInputs, seconds: float) -> float:
    """What a forward pass of so many seconds waits for where they are cut: one gather of the parameters."""
    if not run.layout.shards_parameters:
        return 0.0
    between = traffic.exposed(traffic.collective(run, HALF * run.architecture.parameters), seconds)
    return between + traffic.parameters_from_host(run, 1) / traffic.gathers(run)
