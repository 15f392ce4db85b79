"""The memory that each GPU holds during the whole run: weights, gradients, optimizer state, reference model."""

from __future__ import annotations

from typing import NamedTuple

from trainer.architecture.architecture import Architecture
from trainer.memory.layout import Layout, Term, make_term
from trainer.memory.lora import Lora, lora_of
from trainer.memory.precision import BYTES, Precision, choose_precision, loaded_dtype
from trainer.recipe import Recipe

DEFAULT_OPTIMIZER = "adamw_torch_fused"
"""TRL's default."""
BLOCK = 256
"""Weights per float32 scale in bitsandbytes' blockwise states (arXiv:2110.02861, and `blocksize` in
https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/optim/optimizer.py)."""
ADAM8, ADAM32 = 1 + 4 / BLOCK, 4.0
"""Bytes per element of an 8-bit state with its share of the scale, and of a 32-bit state."""


class Optimizer(NamedTuple):
    """The memory of one of Transformers' optimizers (`optim`)."""

    states: int
    """Values that it keeps per weight."""
    bytes_each: float | None
    """Bytes per value; None if a value has the dtype of the weight that is stepped."""
    transient_states: int = 0
    """Extra values per weight during a step. torch's multi-tensor code computes the root of a whole state at once:
    https://github.com/pytorch/pytorch/blob/main/torch/optim/adamw.py (`_foreach_sqrt`)."""
    offloads: bool = True
    """Whether it can step on the host, which DeepSpeed's offload needs. bitsandbytes' CUDA kernels cannot."""

    def state_bytes(self, stepped_bytes: int) -> float:
        """Return the bytes of state per weight, for weights of `stepped_bytes` bytes."""
        return self.states * (self.bytes_each or stepped_bytes)


OPTIMIZERS = {
    "adamw_torch": Optimizer(2, None, transient_states=1),
    "adamw_torch_fused": Optimizer(2, None),
    "rmsprop": Optimizer(1, None, transient_states=1),
    "adagrad": Optimizer(1, None, transient_states=1),
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
"""By `optim`. Paged states (arXiv:2305.14314, section 3) count as GPU memory: a step waits for states that were moved
to the host."""
LIKE_ADAM = Optimizer(3, ADAM32, transient_states=1, offloads=False)
"""Assumed for an optimizer that is not in the table. It takes more memory than most."""


def optimizer_of(name: str) -> Optimizer:
    """Return the optimizer of this `optim`, or `LIKE_ADAM` if the table does not have it."""
    return OPTIMIZERS.get(name, LIKE_ADAM)


class Case(NamedTuple):
    """A recipe on a layout, with the facts that follow from both. Every memory term is a function of a case."""

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
        """Return the case of a recipe, a model and a layout; `has_bf16` is whether the device computes in bf16."""
        return cls(
            recipe,
            architecture,
            layout,
            choose_precision(recipe, architecture, layout.engine, has_bf16=has_bf16),
            lora_of(recipe, architecture),
            optimizer_of(str(recipe.trainer_args.get("optim", DEFAULT_OPTIMIZER))),
            on_cpu,
        )

    @property
    def trained(self) -> int:
        """The number of trained weights."""
        return self.lora.parameters if self.lora else self.architecture.parameters

    @property
    def stepped_bytes(self) -> int:
        """Bytes per element that the optimizer steps: the float32 master if there is one, else the weight."""
        return self.precision.masters or self.precision.state

    @property
    def sequences(self) -> int:
        """Sequences that pass through the model at once. A DPO pair has two."""
        return self.layout.micro_batch * self.recipe.training_method.sequences_per_row


def model_bytes(architecture: Architecture, precision: Precision) -> float:
    """Return the bytes of the base model: its projections as they are quantised, the rest as it is loaded."""
    projections = architecture.linear_weights
    rest = architecture.parameters - projections
    return projections * precision.projection_bits / 8 + rest * precision.weights


def predict_parameters(case: Case) -> Term:
    """Return the term of the model's parameters.

    ZeRO-3 and FSDP2 shard them. Offloaded parameters take nothing on the GPU (arXiv:1910.02054, section 5.3), except
    the small ones that ZeRO-3 never shards.
    """
    count, precision = case.architecture.parameters, case.precision
    size = model_bytes(case.architecture, precision)
    whole = (
        _count_unsharded(case) * precision.weights
        if case.layout.is_zero and case.layout.parameter_shards > 1
        else 0.0
    )
    if case.layout.offload_parameters:
        return make_term("parameters", whole, "on the host, except norms and biases, which every GPU keeps")
    each = f"{8 * size / count:.2f} bits" if case.recipe.is_quantised else f"{precision.weights} bytes"
    why = f"{count / 1e9:,.2f} billion x {each}{_divided_by(case.layout.parameter_shards)}"
    return make_term("parameters", size / case.layout.parameter_shards + whole, why)


def predict_adapter(case: Case) -> Term:
    """Return the term of LoRA's matrices and of the modules that are trained in full.

    ZeRO-3 does not shard matrices below 1e5 elements, so all of them count as unsharded. FSDP2 shards all.
    """
    shards = case.layout.processes if case.layout.engine == "fsdp2" else 1
    size = case.trained * case.precision.trained / shards if case.lora else 0.0
    rank = case.lora.rank if case.lora else 0
    return make_term(
        "adapter",
        size,
        f"rank {rank}: {case.trained / 1e6:,.1f} million x {case.precision.trained} bytes{_divided_by(shards)}",
    )


def predict_gradients(case: Case) -> Term:
    """Return the term of the gradients, one per trained weight.

    DDP keeps them a second time in its buckets
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html,
    `gradient_as_bucket_view`).
    """
    layout, each = case.layout, case.precision.gradients
    if layout.offload_optimizer:
        return make_term("gradients", 0, "on the host")
    copies = 2 if layout.engine == "ddp" else 1
    size = case.trained * each * copies / layout.state_shards
    buckets = " x 2 with DDP's buckets" if copies == 2 else ""
    why = f"{case.trained / 1e9:,.3f} billion x {each} bytes{buckets}{_divided_by(layout.state_shards)}"
    return make_term("gradients", size, why)


def predict_masters(case: Case) -> Term:
    """Return the term of the float32 copies of half-precision weights (arXiv:1910.02054, section 3.1)."""
    return _predict_state(case, "masters", case.precision.masters)


def predict_optimizer(case: Case) -> Term:
    """Return the term of the optimizer's state."""
    return _predict_state(case, "optimizer", case.optimizer.state_bytes(case.stepped_bytes))


def predict_reference(case: Case) -> Term:
    """Return the term of DPO's second model, in the dtype that the recipe loads.

    TRL shards it under ZeRO-3, but not under ZeRO-2
    (https://github.com/huggingface/trl/blob/main/trl/models/utils.py, `prepare_deepspeed`).
    """
    layout = case.layout
    if layout.reference != "model":
        return make_term("reference", 0, layout.reference)
    if layout.offload_parameters:
        return make_term("reference", 0, "on the host")
    count, each = case.architecture.parameters, reference_bytes(case)
    why = f"{count / 1e9:,.2f} billion x {each} bytes{_divided_by(layout.parameter_shards)}"
    return make_term("reference", count * each / layout.parameter_shards, why)


def reference_bytes(case: Case) -> int:
    """Return the bytes per weight of the reference model. DeepSpeed casts it like the policy."""
    if case.layout.is_zero:
        return case.precision.weights
    return BYTES[loaded_dtype(case.recipe, case.architecture)]


def _predict_state(case: Case, name: str, each: float) -> Term:
    """Return a term of `each` bytes per trained weight, sharded or offloaded like the optimizer state."""
    layout = case.layout
    if layout.offload_optimizer:
        return make_term(name, 0, "on the host")
    why = f"{case.trained / 1e9:,.3f} billion x {each:.3g} bytes{_divided_by(layout.state_shards)}"
    return make_term(name, case.trained * each / layout.state_shards, why)


def _count_unsharded(case: Case) -> int:
    """Return the number of elements in norms and biases.

    ZeRO-3 shards no parameter below 1e5 elements (`stage3_param_persistence_threshold`,
    https://www.deepspeed.ai/docs/config-json/).
    """
    architecture = case.architecture
    linears = sum(linear.weights for linear in architecture.linears.values())
    per_layer = architecture.layer_parameters - linears
    return architecture.num_hidden_layers * per_layer + architecture.hidden_size


def _divided_by(shards: int) -> str:
    return f" / {shards}" if shards > 1 else ""
