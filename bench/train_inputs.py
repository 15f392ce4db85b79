"""Make what both sides of `bench/train.py` train: chats or pairs as long as UltraFeedback's, and a model of any width."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any, NamedTuple

from trainer.worker.synthetic import facts

SPREAD = 0.56
"""Standard deviation of a length over its mean, for UltraFeedback's answers (`trainer/estimate/workload.py`)."""
TOKENS_PER_SENTENCE = 9
"""Approximate value in the tokenizer that is made of the rows."""
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""Zephyr's template without the newline after each end: TRL trains on the last newline, and we do not."""
QUESTIONS = 0.3
"""Part of a sequence that is its prompt: 616 of 1878 bytes in UltraFeedback."""


class Size(NamedTuple):
    """The size of the model, which has Mistral's architecture and random weights."""

    hidden: int
    layers: int
    heads: int
    vocab: int

    def config(self, tokenizer: Any, length: int) -> Any:
        from transformers import MistralConfig

        return MistralConfig(
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 7 // 2,  # Mistral-7B's
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=max(1, self.heads // 4),
            vocab_size=max(self.vocab, len(tokenizer)),
            max_position_embeddings=max(2048, length),
            sliding_window=None,
            initializer_range=1 / math.sqrt(self.hidden),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )


def rows(method: str, count: int, *, tokens: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return questions and answers about the generated facts, many per row. A pair's worse half has wrong answers.

    Args:
        method: sft or dpo.
        count: of rows.
        tokens: mean of a sequence, prompt included, about.
        seed: of lengths and facts.
    """
    choice = random.Random(f"{seed}/{method}")
    return [_row(method, choice, tokens / TOKENS_PER_SENTENCE) for _ in range(count)]


def _row(method: str, choice: random.Random, sentences: float) -> dict[str, Any]:
    known = list(facts())
    asked = [choice.choice(known) for _ in range(_length(choice, sentences * QUESTIONS))]
    prompt = " ".join(choice.choice(fact.questions).format(*fact.subject) for fact in asked)

    def answer(*, right: bool) -> list[dict[str, str]]:
        statements = (
            asked[number % len(asked)] for number in range(_length(choice, sentences * (1 - QUESTIONS)))
        )
        text = " ".join(fact.right if right else choice.choice(fact.wrong) for fact in statements)
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]

    if method == "sft":
        return {"messages": answer(right=True)}
    return {"chosen": answer(right=True), "rejected": answer(right=False)}


def _length(choice: random.Random, mean: float) -> int:
    """Draw from a log-normal distribution with this mean and `SPREAD`."""
    variance = math.log(1 + SPREAD**2)
    return max(1, round(choice.lognormvariate(math.log(mean) - variance / 2, math.sqrt(variance))))


def read(path: Path, count: int) -> list[dict[str, Any]]:
    """Return the first rows of a JSON Lines file with `messages`, or with `chosen` and `rejected` as whole chats."""
    lines = path.read_text().splitlines()[:count]
    wanted = ("messages", "chosen", "rejected")
    return [{name: row[name] for name in wanted if name in row} for row in map(json.loads, lines)]


def write(folder: Path, data: list[dict[str, Any]]) -> Path:
    """Write `train.jsonl` into its own folder, which both sides can read."""
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    return folder / "train.jsonl"


def make_model(into: Path, data: list[dict[str, Any]], size: Size, *, length: int, dtype: str) -> int:
    """Write a tokenizer made of the rows' text and random weights, and return the number of weights."""
    import torch
    from transformers import MistralForCausalLM

    from trainer.worker.model_source import _texts, _train_tokenizer

    tokenizer = _train_tokenizer(_texts(data), min(size.vocab, 2048))
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    model = MistralForCausalLM(size.config(tokenizer, length)).to(getattr(torch, dtype))
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)
    return int(model.num_parameters())


def lengths(method: str, data: list[dict[str, Any]], model: Path, limit: int) -> list[list[int]]:
    """Return the tokens of each row's sequences: one for a chat, two for a pair."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    found = []
    for row in data:
        chats = [row["messages"]] if method == "sft" else [row["chosen"], row["rejected"]]
        texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        tokens = tokenizer(texts, add_special_tokens=False)["input_ids"]
        found.append([min(limit, len(each)) for each in tokens])
    return found
