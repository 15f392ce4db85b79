"""The recipe as a value: what to train, without any hardware, and the digest that decides whether two are the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import PurePath
from typing import Any, Literal, Self

import xxhash
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from trainer.errors import RecipeError
from trainer.method import METHODS, TrainingMethod

BOOKKEEPING = frozenset((
    "logging_steps", "report_to", "run_name", "project", "trackio_bucket_id", "trackio_space_id",
    "trackio_static_space_id", "save_steps", "save_total_limit", "include_num_input_tokens_seen",
    "skip_memory_metrics", "gradient_checkpointing", "gradient_checkpointing_kwargs",
    "activation_checkpointing", "activation_checkpointing_kwargs", "activation_offloading",
    "torch_empty_cache_steps", "per_device_eval_batch_size", "precompute_ref_batch_size",
    "eval_accumulation_steps",
))  # fmt: skip
"""Keys of TRL that change what is logged or saved, or the speed, and never what is trained. The digest skips them."""
LEAST_CHECKPOINTS = 2
"""If the newest checkpoint is damaged, a run resumes from the one before it."""
REFERENCE_FIELDS = {
    "model_name_or_path",
    "init",
    "dataset_mixture",
    "max_prompt_length",
    "truncation_side",
    "chat_template",
    "auto_insert_empty_system_msg",
    "max_train_samples",
}
"""Keys of this project that `reference_key` covers."""
REFERENCE_ARGUMENTS = (
    "max_length",
    "truncation_mode",
    "ld_alpha",
    "model_revision",
    "dtype",
    "load_in_4bit",
    "load_in_8bit",
)
"""Keys of TRL that `reference_key` covers."""


class _Frozen(BaseModel):
    """An immutable value that rejects unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class DataSource(_Frozen):
    """One data set, or a share of its rows."""

    id: str = Field(min_length=1)
    """A Hub id; the path of a .jsonl, .json or .parquet file, or of a folder of them; the URI of such a file in a bucket;
    `generated:chats` or `generated:preferences`."""
    config: str | None = None
    """The name of the data set's configuration on the Hub."""
    split: str = "train"
    columns: dict[str, str] = {}
    """Columns to rename: the name in the data set, and the name that training expects."""
    weight: float = Field(default=1.0, gt=0, le=1)
    """Share of the data set's rows that is used, after a shuffle."""
    revision: str | None = None
    binarise: Literal["mean_rating"] | None = None
    """Build pairs from UltraFeedback's rated answers, by the mean of an answer's ratings. None uses the rows unchanged."""


class Mixture(_Frozen):
    """The mixture of data sets to train on, and the data sets to evaluate on."""

    datasets: tuple[DataSource, ...] = Field(min_length=1)
    test_datasets: tuple[DataSource, ...] = ()
    test_split_size: int | float | None = Field(default=None, gt=0)
    """Rows of the mixture that are set apart for evaluation. A value below 1 is a share of them."""
    seed: int = 42

    @model_validator(mode="after")
    def _one_source_of_tests(self) -> Self:
        """Raise if both ways to name test data are used."""
        if self.test_datasets and self.test_split_size is not None:
            raise RecipeError(
                f"dataset_mixture has {len(self.test_datasets)} test_datasets and test_split_size "
                f"{self.test_split_size}: two sources of test data",
                hint="remove one of them",
            )
        return self


class TinyModel(_Frozen):
    """A Mistral model with random weights and 1.3 M parameters, to try out everything except the model."""

    hidden_size: int = Field(default=128, gt=0)
    intermediate_size: int = Field(default=384, gt=0)
    num_hidden_layers: int = Field(default=4, gt=0)
    num_attention_heads: int = Field(default=4, gt=0)
    num_key_value_heads: int = Field(default=2, gt=0)
    vocab_size: int = Field(default=2048, gt=0)
    max_position_embeddings: int = Field(default=2048, gt=0)

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        """Raise if the sizes do not divide into heads."""
        for whole, part in (
            ("hidden_size", "num_attention_heads"),
            ("num_attention_heads", "num_key_value_heads"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise RecipeError(
                    f"tiny.{whole} {getattr(self, whole)} is not a multiple of tiny.{part} {getattr(self, part)}",
                    hint=f"change tiny.{whole} or tiny.{part}",
                )
        return self


class Recipe(_Frozen):
    """What to train. A recipe trains the same model on every shape."""

    name: str = Field(min_length=1)
    method: str
    """A name in the table `trainer.method.METHODS`."""
    model_name_or_path: str | None = None
    """A Hub id, a local folder, a GGUF file, or the URI of a run's exported model. None with `init`."""
    init: Literal["tiny"] | None = None
    """`tiny` trains a new model with random weights instead of an existing one."""
    tiny: TinyModel = TinyModel()
    dataset_mixture: Mixture
    global_batch_size: int = Field(gt=0)
    """Rows (chats in SFT, pairs in DPO) per optimizer step over all GPUs. A shape never changes it."""
    micro_batch_size: int | None = Field(default=None, gt=0)
    """The most rows that one process computes at a time. None lets the fit choose."""
    engine: Literal["ddp", "zero2", "zero3", "fsdp2"] | None = None
    """How the training state is distributed over processes. None lets the fit choose."""
    offload: Literal["none", "optimizer", "all"] | None = None
    """What is kept in the host's memory: the optimizer state, or also the parameters. None lets the fit choose."""
    max_prompt_length: int | None = Field(default=None, gt=0)
    """Tokens that a prompt is cut to, on `truncation_side`. None does not cut prompts. Only some methods read it."""
    truncation_side: Literal["left", "right"] = "left"
    chat_template: str | None = None
    """Jinja text. None uses the tokenizer's own template."""
    auto_insert_empty_system_msg: bool = True
    max_train_samples: int | None = Field(default=None, gt=0)
    max_test_samples: int | None = Field(default=None, gt=0)
    trainer_args: dict[str, Any] = {}
    """Keys of the method's class in TRL (SFTConfig, DPOConfig), without those that the fit or the run decides."""
    model_args: dict[str, Any] = {}
    """Keys of TRL's ModelConfig, without the model's name."""

    @field_validator("method")
    @classmethod
    def _is_known_method(cls, method: str) -> str:
        if method not in METHODS:
            raise ValueError(f"must be one of {', '.join(METHODS)}")
        return method

    @model_validator(mode="after")
    def _trainable(self) -> Self:
        self._check_model()
        self._check_engine()
        self._check_batch()
        self._check_trainer_args()
        return self

    def _check_model(self) -> None:
        """Raise if there is not exactly one model, or it is quantised in a way that cannot be trained."""
        if (self.model_name_or_path is None) == (self.init is None):
            both = self.init is not None
            raise RecipeError(
                f"recipe {self.name} has {'both' if both else 'neither'} `model_name_or_path` "
                f"{'and' if both else 'nor'} `init`",
                hint="remove one of them"
                if both
                else "add `model_name_or_path: <Hub id or folder>`, or `init: tiny`",
            )
        if self.model_args.get("load_in_4bit") and self.model_args.get("load_in_8bit"):
            raise RecipeError(
                f"recipe {self.name} has both `load_in_4bit` and `load_in_8bit`", hint="remove one of them"
            )
        if self.is_quantised and not self.is_lora:
            raise RecipeError(
                f"recipe {self.name}: `load_in_{self.quantised_bits}bit: true` freezes the model, and no LoRA adapter is trained",
                hint="add `use_peft: true`",
            )

    def _check_engine(self) -> None:
        """Raise if no machine could run this combination of engine, quantisation and offload."""
        if self.engine is None:
            return
        if self.is_quantised and self.engine != "ddp":
            raise RecipeError(
                f"recipe {self.name}: `engine: {self.engine}` shards weights, and the weights that bitsandbytes packs for "
                f"`load_in_{self.quantised_bits}bit: true` cannot be sharded",
                hint=f"remove `engine` or `load_in_{self.quantised_bits}bit`",
            )
        wanted = {"optimizer": ("zero2", "zero3"), "all": ("zero3",)}.get(self.offload or "none")
        if wanted and self.engine not in wanted:
            raise RecipeError(
                f"recipe {self.name}: `engine: {self.engine}` does not support `offload: {self.offload}`",
                hint=f"use `engine: {wanted[-1]}`, or remove one of them",
            )

    def _check_batch(self) -> None:
        """Raise if the micro batch does not divide the global batch."""
        if self.micro_batch_size and self.global_batch_size % self.micro_batch_size:
            raise RecipeError(
                f"recipe {self.name}: micro_batch_size {self.micro_batch_size} does not divide "
                f"global_batch_size {self.global_batch_size}",
                hint="remove `micro_batch_size` to let the fit choose",
            )

    def _check_trainer_args(self) -> None:
        """Raise if settings of TRL would drop all data, or make training depend on the shape."""
        longest = self.trainer_args.get("max_length")
        if self.max_prompt_length and longest and self.max_prompt_length >= longest:
            raise RecipeError(
                f"recipe {self.name}: max_prompt_length {self.max_prompt_length} leaves no tokens for an answer within "
                f"max_length {longest}",
                hint="raise `max_length`; TRL would drop such pairs silently",
            )
        order = self.trainer_args.get("train_sampling_strategy", "random")
        if order in ("group_by_length", "batch_rebalance"):
            raise RecipeError(
                f"recipe {self.name}: `train_sampling_strategy: {order}` makes the order of samples depend on the number of GPUs",
                hint="remove it; the order is then random, and the same on every shape",
            )

    @property
    def training_method(self) -> TrainingMethod:
        """The method's row in the table of methods."""
        return METHODS[self.method]

    @property
    def max_length(self) -> int:
        """The length in tokens that sequences are cut to, for predictions; the method's default if unset."""
        return int(self.trainer_args.get("max_length") or self.training_method.max_length)

    @property
    def is_packed(self) -> bool:
        """Whether several rows share one sequence, so that every sequence is full and none is padded."""
        return self.training_method.can_pack and bool(self.trainer_args.get("packing"))

    @property
    def is_lora(self) -> bool:
        """Whether a LoRA adapter is trained, and the base model is frozen."""
        return bool(self.model_args.get("use_peft"))

    @property
    def quantised_bits(self) -> Literal[4, 8] | None:
        """The bits per weight that the base model is loaded in, if bitsandbytes quantises it."""
        if self.model_args.get("load_in_8bit"):
            return 8
        return 4 if self.model_args.get("load_in_4bit") else None

    @property
    def is_quantised(self) -> bool:
        """Whether the base model is loaded in 4 or 8 bits."""
        return self.quantised_bits is not None

    @property
    def seed(self) -> int:
        """The seed of the weights that training adds, of dropout, and of the order of samples."""
        return int(self.trainer_args.get("seed", 42))

    @property
    def reports(self) -> tuple[str, ...]:
        """The experiment trackers that `report_to` names; empty if unset."""
        named = self.trainer_args.get("report_to") or "none"
        return tuple(name for name in ([named] if isinstance(named, str) else named) if name != "none")

    def with_data(self, place: Callable[[str], str]) -> Recipe:
        """Return the recipe with `place` applied to the id of every data set."""

        def moved(sources: tuple[DataSource, ...]) -> tuple[DataSource, ...]:
            return tuple(source.model_copy(update={"id": place(source.id)}) for source in sources)

        mixture = self.dataset_mixture
        update = {"datasets": moved(mixture.datasets), "test_datasets": moved(mixture.test_datasets)}
        return self.model_copy(update={"dataset_mixture": mixture.model_copy(update=update)})

    @property
    def keep_checkpoints(self) -> int:
        """The number of committed checkpoints that the bucket keeps."""
        return max(LEAST_CHECKPOINTS, int(self.trainer_args.get("save_total_limit") or LEAST_CHECKPOINTS))

    def as_flat(self) -> dict[str, Any]:
        """Return the recipe as a recipe file has it: one level of keys, without those at their defaults."""
        keys = self.model_dump(mode="json", exclude_defaults=True, exclude={"trainer_args", "model_args"})
        return {**keys, **self.model_args, **self.trainer_args}

    def digest(self) -> str:
        """Return the XXH3 hash (128 bits, hex) of everything that decides what is trained, without bookkeeping keys."""
        return xxhash.xxh3_128_hexdigest(
            json.dumps(self._trajectory(), sort_keys=True, separators=(",", ":")).encode()
        )

    def differences(self, other: Recipe) -> list[str]:
        """Return the keys for which `digest` differs between this recipe (there) and `other` (here), one line each."""
        mine, others = _flat(self._trajectory()), _flat(other._trajectory())
        return [
            f"{key}: {mine.get(key, 'unset')} there, {others.get(key, 'unset')} here"
            for key in dict.fromkeys((*mine, *others))
            if mine.get(key) != others.get(key) or (key in mine) != (key in others)
        ]

    def _trajectory(self) -> dict[str, Any]:
        """Return everything that decides what is trained, in a form that is equal for equal recipes."""
        unused = {
            "name", "micro_batch_size", "engine", "offload", "max_test_samples", "trainer_args", "model_args",
        }  # fmt: skip
        data = self.model_dump(mode="json", exclude=unused | (set() if self.init else {"tiny"}))
        data["model_name_or_path"] = _portable(self.model_name_or_path)
        for source in (*data["dataset_mixture"]["datasets"], *data["dataset_mixture"]["test_datasets"]):
            source["id"] = _portable(source["id"])
            if source["binarise"] is None:  # keeps the digest of recipes from before this key existed
                del source["binarise"]
        arguments = {key: value for key, value in self.trainer_args.items() if key not in BOOKKEEPING}
        result: dict[str, Any] = _canonical({**data, **arguments, **self.model_args})
        return result


def _portable(path: str | None) -> str | None:
    """Return a local path without its folder, which differs between machines. The data's fingerprint covers the content."""
    return PurePath(path).name if path and PurePath(path).is_absolute() else path


def _canonical(value: Any) -> Any:
    """Return nested values with whole floats as integers, so that `1` and `1.0` give one digest."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings, and lists of mappings, under dotted keys."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        nested = item
        if isinstance(item, list) and item and isinstance(item[0], dict):
            nested = {str(index): entry for index, entry in enumerate(item)}
        if isinstance(nested, dict) and nested:
            flat |= _flat(nested, f"{prefix}{key}.")
        else:
            flat[prefix + key] = item
    return flat


def may_sort(recipe: Recipe) -> bool:
    """Return whether loss and gradient are the same for every way to split a global batch into micro batches.

    A loss that is a mean over tokens divides by the learned tokens of the whole global batch, over all ranks and micro
    batches. A mean over rows gives every micro batch the same weight, since all have equally many rows. A loss that
    compares the rows of one micro batch depends on the split: its rows stay in random order.
    """
    method, settings = recipe.training_method, recipe.trainer_args
    if method.averages_tokens and settings.get("average_tokens_across_devices") is False:
        return False
    losses = settings.get("loss_type") or ()
    return method.micro_batch_losses.isdisjoint([losses] if isinstance(losses, str) else losses)


def reference_key(recipe: Recipe) -> str:
    """Return the XXH3 hash (128 bits, hex) of the settings that decide the model and the training data.

    Runs with equal keys look for each other's log-probabilities of the reference. If a key is too coarse (a file's
    content changed), the worker's fingerprint still detects the difference. If it is too fine, something is computed twice.
    """
    settings: dict[str, Any] = recipe.model_dump(mode="json", include=REFERENCE_FIELDS)
    settings["dataset_mixture"].pop("test_datasets")
    if recipe.init:
        settings |= {"tiny": recipe.tiny.model_dump(), "seed": recipe.seed}
    for source in settings["dataset_mixture"]["datasets"]:
        source["id"] = _portable(source["id"])
    settings["model_name_or_path"] = _portable(settings["model_name_or_path"])
    arguments = {**recipe.trainer_args, **recipe.model_args}
    settings |= {name: arguments.get(name) for name in REFERENCE_ARGUMENTS}
    return xxhash.xxh3_128_hexdigest(json.dumps(settings, sort_keys=True).encode())
