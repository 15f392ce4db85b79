"""The estimate of how long a recipe trains on a shape: every second of a step, with its reason.

Reading and tokenising rows, logging, and uploads are left out, because they run while the GPU computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict

from trainer.architecture import Architecture
from trainer.estimate import batch as batches
from trainer.estimate import traffic
from trainer.estimate.arithmetic import BACKWARD_ATTENTION, HALF, Pass, StepInputs, one_pass
from trainer.estimate.batch import MicroBatch
from trainer.estimate.efficiency import TRANSFORMERS, TRANSFORMERS_4BIT, Machine, Stack, make_machine
from trainer.estimate.workload import Workload
from trainer.hardware import Gpu, Shape, gpu_of
from trainer.hardware import gpu as named_gpu
from trainer.memory import Layout
from trainer.recipe import Recipe
from trainer.recipe.model import may_sort

EVAL_BATCH = 8
"""The default `per_device_eval_batch_size` of TrainingArguments."""
STAND_IN = named_gpu("A100")
"""The GPU that `step_s` assumes for one that is not in the table."""
LOGIT_BYTES = 30
"""Bytes that the loss moves through memory per logit of the policy: bf16, fp32, softmax and their gradients. Counted in
TRL's losses."""
SAVES = "saves"
"""The name of the term of the saves."""


class StepTerm(BaseModel):
    """One thing that an optimizer step waits for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    seconds: float
    """Seconds per optimizer step. Evaluations and saves are spread over all steps."""
    why: str
    """The numbers of the formula, and its source if it is not plain division."""


class Estimate(BaseModel):
    """How long a recipe trains on a shape without preemptions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int
    """Optimizer steps of the whole run."""
    step_s: float
    """The sum of `terms`."""
    load_s: float
    """Seconds before the first step on a fresh node: container, model, data set. A restore is added to it."""
    once_s: float
    """Seconds outside the steps, spent once per run: precomputing the reference's log-probabilities."""
    checkpoint_bytes: int
    """Bytes that one save uploads."""
    restore_s: float
    """Seconds to download and load a checkpoint, in addition to `load_s`."""
    save_s: float
    """Seconds that training waits for a save. The upload runs in the background."""
    upload_s: float
    """Seconds from a save until it is committed. A preemption before that resumes from the checkpoint before it."""
    tokens: int
    """Tokens per step over all GPUs, without padding. A DPO pair counts both of its sequences."""
    terms: tuple[StepTerm, ...]

    @property
    def saves_s(self) -> float:
        """Seconds of all saves of the run, at the recipe's own `save_steps`."""
        return self.steps * sum(term.seconds for term in self.terms if term.name == SAVES)

    @property
    def work_s(self) -> float:
        """Seconds of training alone, without starts, restores and saves: the work of
        `launcher.plan.spot.spot_expectation`.
        """
        return self.steps * self.step_s + self.once_s - self.saves_s

    @property
    def hours(self) -> float:
        """Hours of one node for an undisturbed run: load, work and saves."""
        return (self.load_s + self.work_s + self.saves_s) / 3600

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second over all GPUs, without padding."""
        return self.tokens / self.step_s


def estimate(  # noqa: PLR0913 - five inputs are required, and five replace a default
    recipe: Recipe,
    architecture: Architecture,
    fit: Layout,
    shape: Shape,
    workload: Workload,
    *,
    gpu: Gpu | None = None,
    network_gbps: float | None = None,
    rates: traffic.Rates | None = None,
    stack: Stack | None = None,
    in_order: bool | None = None,
) -> Estimate:
    """Predict the time of a recipe under a fit (any layout) on a shape.

    Args:
        recipe: the recipe.
        architecture: the architecture of its model.
        fit: how the work is split over the machines.
        shape: the machines.
        workload: rows and tokens.
        gpu: replaces the GPU of the table.
        network_gbps: GB/s of a node's network, if it is known.
        rates: the rates of bucket and Hub, if they are known.
        stack: replaces Transformers, for comparisons with other software.
        in_order: whether a global batch is sorted by length; None means sorted if the loss allows it.

    Raises:
        UserError: the shape's GPU is not in the table, and no `gpu` is given.
    """
    run = _run(recipe, architecture, fit, make_machine(shape, gpu or _find_gpu(shape), network_gbps), stack)
    micro, total = _make_micro(run, workload, in_order=in_order), batches.count_steps(recipe, workload)
    terms = tuple(each for each in _terms(run, micro, total, workload) if each.seconds)
    used_rates = rates or traffic.Rates()
    return Estimate(
        steps=total,
        step_s=sum(each.seconds for each in terms),
        load_s=traffic.load_s(run, used_rates),
        once_s=_reference_s(run, micro, workload),
        checkpoint_bytes=traffic.checkpoint_bytes(run),
        restore_s=traffic.restore_s(run, used_rates),
        save_s=traffic.save_s(run),
        upload_s=traffic.upload_s(run, used_rates),
        tokens=round(micro.real * micro.accumulation * micro.processes),
        terms=terms,
    )


def step_s(
    recipe: Recipe, architecture: Architecture, layout: Layout, shape: Shape, workload: Workload
) -> float:
    """Return the seconds of an optimizer step, without evaluations and saves. The fit compares layouts by them.

    A GPU outside the table counts as an A100, because the comparison depends on the relation of arithmetic to traffic.
    """
    run = _run(recipe, architecture, layout, make_machine(shape, gpu_of(shape) or STAND_IN, None))
    return sum(term.seconds for term in _step_terms(run, _make_micro(run, workload)))


def _run(
    recipe: Recipe, architecture: Architecture, layout: Layout, on: Machine, stack: Stack | None = None
) -> StepInputs:
    usual = TRANSFORMERS_4BIT if recipe.quantised_bits == 4 else TRANSFORMERS
    return StepInputs(
        recipe=recipe, architecture=architecture, layout=layout, machine=on, stack=stack or usual
    )


def _make_micro(run: StepInputs, workload: Workload, *, in_order: bool | None = None) -> MicroBatch:
    ordered = may_sort(run.recipe) if in_order is None else in_order
    return batches.make_micro_batch(run.recipe, run.layout, workload, in_order=ordered)


def _find_gpu(shape: Shape) -> Gpu | None:
    return gpu_of(shape) or (named_gpu(shape.accelerator) if shape.accelerator else None)


def _terms(run: StepInputs, micro: MicroBatch, total: int, workload: Workload) -> Iterator[StepTerm]:
    yield from _step_terms(run, micro)
    yield from _occasional_terms(run, total, workload)


def _step_terms(run: StepInputs, micro: MicroBatch) -> Iterator[StepTerm]:
    arithmetic = list(_arithmetic_terms(run, micro))
    yield from arithmetic
    yield from _traffic_terms(run, micro.accumulation, sum(each.seconds for each in arithmetic))


def _arithmetic_terms(run: StepInputs, micro: MicroBatch) -> Iterator[StepTerm]:
    each, count = one_pass(run, micro), micro.accumulation
    size = f"{count} x {micro.sequences} sequences of {micro.length:.0f} tokens"
    yield StepTerm(name="forward", seconds=count * each.seconds(), why=f"{size}; {_rates(run)}")
    if run.layout.activation_checkpointing:
        yield StepTerm(
            name="recomputation", seconds=count * each.seconds(), why="the forward pass of each layer again"
        )
    yield StepTerm(name="backward", seconds=count * _backward_s(run, each), why=_why_backward(run))
    if traffic.has_reference_pass(run):
        other = one_pass(run, micro, adapted=False).seconds()
        yield StepTerm(
            name="reference",
            seconds=count * other,
            why=f"a forward pass of the reference ({run.layout.reference})",
        )
    loss = LOGIT_BYTES * run.architecture.vocab_size * micro.tokens / run.machine.memory
    yield StepTerm(name="loss", seconds=count * loss, why=f"{run.architecture.vocab_size} logits per token")


def _backward_s(run: StepInputs, each: Pass) -> float:
    products = 1.0 if run.recipe.is_lora else 2.0
    attentions = 2.0 if run.layout.attention == "eager" else BACKWARD_ATTENTION
    return each.seconds(matmuls=products, attentions=attentions, memories=2.0)


def _why_backward(run: StepInputs) -> str:
    if run.recipe.is_lora:
        return "gradients of inputs only, because the weights are frozen"
    return "gradients of inputs and of weights: twice the forward pass"


def _rates(run: StepInputs) -> str:
    unsure = "" if run.machine.measured else ", a rate that no published run has checked"
    model = f"{run.architecture.parameters / 1e9:.2f} B parameters"
    return f"{model} at {run.machine.flops / 1e12:.0f} TFLOP/s of {run.machine.name}{unsure}"


def _traffic_terms(run: StepInputs, accumulation: int, compute_s: float) -> Iterator[StepTerm]:
    between = traffic.between_gpus_s(run, accumulation)
    yield StepTerm(
        name="traffic between GPUs",
        seconds=traffic.exposed_s(between, compute_s),
        why=f"{run.layout.engine} over {run.layout.processes} processes, {run.layout.nodes} node{'s' if run.layout.nodes > 1 else ''}",
    )
    gather = traffic.parameters_from_host_s(run, accumulation)
    yield StepTerm(
        name="parameters from host",
        seconds=gather,
        why=f"{traffic.count_gathers(run)} gathers per micro batch over PCIe",
    )
    down = traffic.gradients_to_host_s(run, accumulation)
    yield StepTerm(name="gradients to host", seconds=down, why="over PCIe, one shard per process")
    where = "on the host's CPUs" if run.layout.offload_optimizer else "on the GPU"
    yield StepTerm(
        name="optimizer", seconds=traffic.optimizer_step_s(run), why=f"{traffic.optimizer_name(run)} {where}"
    )


def _occasional_terms(run: StepInputs, total: int, workload: Workload) -> Iterator[StepTerm]:
    evaluations = batches.count_evaluations(run.recipe, total)
    if workload.test_rows and evaluations:
        seconds = evaluations * _evaluation_s(run, workload)
        why = f"{evaluations} times {workload.test_rows} rows, {seconds / evaluations:.0f} s each"
        yield StepTerm(name="evaluation", seconds=seconds / total, why=why)
    saves, stall = batches.count_saves(run.recipe, total), traffic.save_s(run)
    yield StepTerm(
        name=SAVES,
        seconds=saves * stall / total,
        why=f"{saves} times {stall:.2f} s; uploads run in the background",
    )


def _evaluation_s(run: StepInputs, workload: Workload) -> float:
    each = int(run.recipe.trainer_args.get("per_device_eval_batch_size") or EVAL_BATCH)
    layout = run.layout.model_copy(update={"micro_batch": each})
    micro = batches.make_micro_batch(run.recipe, layout, workload, in_order=False)
    full = batches.count_rows(run.recipe, workload.model_copy(update={"rows": workload.test_rows}))
    passes = math.ceil(full / (each * run.layout.processes))
    seconds = _forward_s(run, micro)
    if run.layout.shards_parameters:
        gathers = traffic.count_gathers(run) - 1  # an evaluation has no backward pass
        between = gathers * traffic.collective_s(run, HALF * run.architecture.parameters)
        seconds += traffic.exposed_s(between, seconds)
        seconds += traffic.parameters_from_host_s(run, 1) * gathers / traffic.count_gathers(run)
    return passes * seconds


def _forward_s(run: StepInputs, micro: MicroBatch) -> float:
    policy = one_pass(run, micro).seconds()
    return policy + (
        one_pass(run, micro, adapted=False).seconds() if traffic.has_reference_pass(run) else 0.0
    )


def _reference_s(run: StepInputs, micro: MicroBatch, workload: Workload) -> float:
    """Return the seconds of the reference's pass over all training rows that are used, and over the test rows.

    Rows are sorted by length for this pass, so they have hardly any padding.
    """
    if run.layout.reference != "precomputed":
        return 0.0
    rows = min(workload.rows, batches.count_steps(run.recipe, workload) * run.recipe.global_batch_size)
    sorted_ = micro.of_length(math.ceil(micro.real / micro.sequences))
    passes = math.ceil(
        (rows + _count_test_rows(run, workload)) / (run.layout.micro_batch * run.layout.processes)
    )
    seconds = one_pass(run, sorted_, adapted=False).seconds()
    return passes * (seconds + _gather_s(run, seconds))


def _count_test_rows(run: StepInputs, workload: Workload) -> int:
    """Return the test rows whose reference log-probabilities the evaluations need."""
    return (
        workload.test_rows
        if batches.count_evaluations(run.recipe, batches.count_steps(run.recipe, workload))
        else 0
    )


def _gather_s(run: StepInputs, seconds: float) -> float:
    """Return the seconds that a forward pass of `seconds` waits for one gather of sharded parameters."""
    if not run.layout.shards_parameters:
        return 0.0
    between = traffic.exposed_s(traffic.collective_s(run, HALF * run.architecture.parameters), seconds)
    return between + traffic.parameters_from_host_s(run, 1) / traffic.count_gathers(run)
