"""What each GPU holds all the time: weights, gradients, optimizer, reference; a function a term."""

from __future__ import annotations

from typing import NamedTuple

from trainer.architecture.architecture import Architecture
from trainer.memory.layout import Layout, Term, term
from trainer.memory.lora import Lora, lora_of
from trainer.memory.precision import BYTES, Precision, loaded_dtype, precision
from trainer.recipe import Recipe

DEFAULT_OPTIMIZER = "adamw_torch_fused"
"""TRL's."""


class Case(NamedTuple):
    """A recipe on a layout, with what follows from the two; what every term is a function of."""

    recipe: Recipe
    architecture: Architecture
    layout: Layout
    precision: Precision
    lora: Lora | None
    optimizer: Optimizer
    on_cpu: bool = False

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        architecture: Architecture,
        layout: Layout,
        *,
        has_bf16: bool = True,
        on_cpu: bool = False,
    ) -> Case:
        return cls(
            recipe,
            architecture,
            layout,
            precision(recipe, architecture, layout.engine, has_bf16=has_bf16),
            lora_of(recipe, architecture),
            optimizer_of(str(recipe.trainer_args.get("optim", DEFAULT_OPTIMIZER))),
            on_cpu,
        )

    @property
    def trained(self) -> int:
        """Weights that are trained."""
        return self.lora.parameters if self.lora else self.architecture.parameters

    @property
    def stepped_bytes(self) -> int:
        """Of a number that the optimizer steps: the master, where there is one."""
        return self.precision.masters or self.precision.state

    @property
    def sequences(self) -> int:
        """That pass through the model at once: a DPO pair is two."""
        return self.layout.micro_batch * self.recipe.training_method.sequences_per_row


def model_bytes(architecture: Architecture, precision: Precision) -> float:
    """Of the base model's weights: the projections as they are quantised, and the rest as it is loaded."""
    projections = architecture.linear_weights
    rest = architecture.parameters - projections
    return projections * precision.projection_bits / 8 + rest * precision.weights


def parameters(case: Case) -> Term:
    """The model, a part of it under ZeRO 3 and FSDP 2, or nothing once it is offloaded (arXiv:1910.02054, section 5.3)."""
    count, precision = case.architecture.parameters, case.precision
    size = model_bytes(case.architecture, precision)
    whole = (
        _never_cut(case) * precision.weights
        if case.layout.is_zero and case.layout.parameter_shards > 1
        else 0.0
    )
    if case.layout.offload_parameters:
        return term("parameters", whole, "on the host, but for norms and biases, which every GPU keeps")
    each = f"{8 * size / count:.2f} bits" if case.recipe.is_quantised else f"{precision.weights} bytes"
    why = f"{count / 1e9:,.2f} billion x {each}{_over(case.layout.parameter_shards)}"
    return term("parameters", size / case.layout.parameter_shards + whole, why)


def adapter(case: Case) -> Term:
    """LoRA's matrices and the modules that are trained whole; ZeRO 3 leaves matrices below 1e5 elements whole, so
    none are counted as cut; FSDP 2 cuts all.
    """
    shards = case.layout.processes if case.layout.engine == "fsdp2" else 1
    size = case.trained * case.precision.trained / shards if case.lora else 0.0
    rank = case.lora.rank if case.lora else 0
    return term(
        "adapter",
        size,
        f"rank {rank}: {case.trained / 1e6:,.1f} million x {case.precision.trained} bytes{_over(shards)}",
    )


def gradients(case: Case) -> Term:
    """As many as there are trained weights; DDP keeps them a second time, in its buckets
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html,
    `gradient_as_bucket_view`).
    """
    layout, each = case.layout, case.precision.gradients
    if layout.offload_optimizer:
        return term("gradients", 0, "on the host")
    copies = 2 if layout.engine == "ddp" else 1
    size = case.trained * each * copies / layout.state_shards
    buckets = " x 2 with DDP's buckets" if copies == 2 else ""
    why = f"{case.trained / 1e9:,.3f} billion x {each} bytes{buckets}{_over(layout.state_shards)}"
    return term("gradients", size, why)


def masters(case: Case) -> Term:
    """Float32 copies of weights that are in half precision (arXiv:1910.02054, section 3.1)."""
    return _state(case, "masters", case.precision.masters)


def optimizer(case: Case) -> Term:
    """The optimizer's own numbers for every trained weight."""
    return _state(case, "optimizer", case.optimizer.state_bytes(case.stepped_bytes))


def reference(case: Case) -> Term:
    """DPO's second model, in the dtype that the recipe loads; under ZeRO 3 TRL cuts it too, under ZeRO 2 not
    (https://github.com/huggingface/trl/blob/main/trl/models/utils.py, `prepare_deepspeed`).
    """
    layout = case.layout
    if layout.reference != "model":
        return term("reference", 0, layout.reference)
    if layout.offload_parameters:
        return term("reference", 0, "on the host")
    count, each = case.architecture.parameters, reference_bytes(case)
    why = f"{count / 1e9:,.2f} billion x {each} bytes{_over(layout.parameter_shards)}"
    return term("reference", count * each / layout.parameter_shards, why)


def reference_bytes(case: Case) -> int:
    """Of a weight of the reference: DeepSpeed casts it as it casts the policy."""
    if case.layout.is_zero:
        return case.precision.weights
    return BYTES[loaded_dtype(case.recipe, case.architecture)]


def _state(case: Case, name: str, each: float) -> Term:
    layout = case.layout
    if layout.offload_optimizer:
        return term(name, 0, "on the host")
    why = f"{case.trained / 1e9:,.3f} billion x {each:.3g} bytes{_over(layout.state_shards)}"
    return term(name, case.trained * each / layout.state_shards, why)


def _never_cut(case: Case) -> int:
    """Elements of norms and biases: ZeRO 3 cuts no parameter below 1e5 elements (`stage3_param_persistence_threshold`,
    https://www.deepspeed.ai/docs/config-json/).
    """
    architecture = case.architecture
    per_layer = architecture.layer_parameters - sum(each.weights for each in architecture.linears.values())
    return architecture.num_hidden_layers * per_layer + architecture.hidden_size


def _over(shards: int) -> str:
    return f" / {shards}" if shards > 1 else ""


BLOCK = 256
"""Weights to a float32 scale in bitsandbytes' blockwise states (arXiv:2110.02861, and `blocksize` in
https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/optim/optimizer.py)."""


class Optimizer(NamedTuple):
    """An optimizer of Transformers' `optim`."""

    states: int
    """Numbers kept for each weight."""
    bytes_each: float | None
    """Of a state; None: as the weight that is stepped."""
    in_passing: int = 0
    """Numbers more for each weight while it steps: torch's multi-tensor code takes the root of a whole state at once,
    https://github.com/pytorch/pytorch/blob/main/torch/optim/adamw.py (`_foreach_sqrt`)."""
    offloads: bool = True
    """It can step on the host, as DeepSpeed's offload wants; bitsandbytes' CUDA kernels cannot."""

    def state_bytes(self, stepped_bytes: int) -> float:
        """For each weight that is stepped in numbers of `stepped_bytes`."""
        return self.states * (self.bytes_each or stepped_bytes)


ADAM8, ADAM32 = 1 + 4 / BLOCK, 4.0
OPTIMIZERS = {
    "adamw_torch": Optimizer(2, None, in_passing=1),
    "adamw_torch_fused": Optimizer(2, None),
    "rmsprop": Optimizer(1, None, in_passing=1),
    "adagrad": Optimizer(1, None, in_passing=1),
    "sgd": Optimizer(0, None),
    "paged_adamw_32bit": Optimizer(2, ADAM32, offloads=False),
    "paged_adamw_8bit": Optimizer(2, ADAM8, offloads=False),
    "adamw_8bit": Optimizer(2, ADAM8, offloads=False),
    "adamw_bnb_8bit": Optimizer(2, ADAM8, offloads=False),
    "lion_32bit": Optimizer(1, ADAM32, offloads=False),
    "lion_8bit": Optimizer(1, ADAM8, offloads=False),
    "paged_lion_32bit": Optimizer(1, ADAM32, offloads=False),
    "paged_lion_8bit": Optimizer(1, ADAM8, offloads=False),
    "rmsprop_bnb": Optimizer(1, ADAM32, offloads=False),
    "rmsprop_bnb_32bit": Optimizer(1, ADAM32, offloads=False),
    "rmsprop_bnb_8bit": Optimizer(1, ADAM8, offloads=False),
    "ademamix": Optimizer(3, ADAM32, offloads=False),
    "ademamix_8bit": Optimizer(3, ADAM8, offloads=False),
    "paged_ademamix_32bit": Optimizer(3, ADAM32, offloads=False),
    "paged_ademamix_8bit": Optimizer(3, ADAM8, offloads=False),
}
"""By `optim`. Paged states (arXiv:2305.14314, section 3) count as on the GPU: where they are moved out, a step waits."""
LIKE_ADAM = Optimizer(3, ADAM32, in_passing=1, offloads=False)
"""One that is not listed: more than most take."""


def optimizer_of(name: str) -> Optimizer:
    return OPTIMIZERS.get(name, LIKE_ADAM)
