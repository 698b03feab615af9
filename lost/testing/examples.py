"""Small made-up examples for tests of fine-tuning, and the arguments of runs on them."""

import json
import random
from pathlib import Path

import torch
from transformers import (
    LlamaForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

from lost.testing.tiny import tiny_llama, tiny_tokenizer

WORDS = {0: ["bad", "poor", "awful"], 1: ["good", "fine", "great"]}


def write_labelled(path: Path, count: int, seed: int = 0) -> Path:
    """A .jsonl file of texts whose words say their label, 0 or 1."""
    generator = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            label = generator.randint(0, 1)
            text = " ".join(generator.choices(WORDS[label], k=generator.randint(2, 5)))
            file.write(json.dumps({"text": text, "label": label}) + "\n")
    return path


def write_conversations(path: Path, count: int, seed: int = 0) -> Path:
    """A .jsonl file of questions and answers of one or two turns."""
    generator = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            messages = []
            for word in generator.choices(["cat", "dog", "cow"], k=generator.randint(1, 2)):
                messages.append({"role": "user", "content": word})
                messages.append({"role": "assistant", "content": word[::-1]})
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def tiny_roberta(folder: Path) -> Path:
    """A folder with a RoBERTa of two blocks with random weights and a tokenizer."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=258,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=66,
        type_vocab_size=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    RobertaForMaskedLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_classifier(folder: Path, family: str, names: list[str], seed: int = 0) -> PreTrainedModel:
    """A folder with a classifier with random weights and a tokenizer; the model, in eval mode.

    Args:
        family: llama or roberta.
        names: of its labels.
    """
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    if family == "llama":
        config = tiny_llama().config
        config.update(labels | {"pad_token_id": tiny_tokenizer().pad_token_id})
        model = LlamaForSequenceClassification(config)
    else:
        sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
        model = RobertaForSequenceClassification(RobertaConfig(vocab_size=258, pad_token_id=0, **sizes, **labels))
    torch.manual_seed(seed)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, 0, 0.3)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model.eval()


def finetune_run(run_dir: Path, source: Path, examples: Path, *overrides: str) -> list[str]:
    """Arguments of a `lost finetune` that takes seconds: 12 steps of 8 labelled texts."""
    return [
        "finetune",
        f"source={source}",
        "task=classification",
        f"data.train_files=[{examples}]",
        f"data.cache_dir={examples.parent / 'cache'}",
        f"run_dir={run_dir}",
        "train.seq_len=32",
        "train.global_batch_size=8",
        "train.micro_batch_size=4",
        "train.max_steps=12",
        "optimizer.learning_rate=0.003",
        "evaluation.every_steps=5",
        "checkpoint.every_steps=4",
        "logging=none",
        *overrides,
    ]
