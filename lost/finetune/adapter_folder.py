"""Writes an adapter folder, and reads one together with its model."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lost.assemble.adapter import (
    FACTS_NAME,
    WEIGHTS_NAME,
    AdapterFacts,
    add_stored_adapter,
    base_of,
    read_adapter_facts,
)
from lost.assemble.load import load_model
from lost.assemble.locate import locate
from lost.checkpoint.io import write_json
from lost.finetune.start import Head, classifier, head_modules
from lost.train.engine import trained_tensors
from lost.utils.files import appearing
from lost.utils.quiet import quiet_libraries


def save_adapter(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, facts: AdapterFacts, card: str
) -> None:
    """Writes adapter weights, the trained head of a classifier, lost_adapter.json, tokenizer and README.md.

    LoRA in the format of peft, which loads the folder too. The folder appears in one rename; an older one is replaced.

    Raises:
        LostError: it could not be written; an older folder is then still there.
    """
    with appearing(folder, replaces=True) as partial:
        if isinstance(model, PreTrainedModel):
            tensors = {name: value.detach().cpu().contiguous() for name, value in trained_tensors(model).items()}
            save_file(tensors, partial / WEIGHTS_NAME, metadata={"format": "pt"})
        else:
            with quiet_libraries():
                model.save_pretrained(str(partial))  # pyright: ignore[reportCallIssue]
        tokenizer.save_pretrained(partial)
        write_json(partial / FACTS_NAME, facts.to_dict())
        (partial / "README.md").write_text(card, encoding="utf-8")


def load_adapted(folder: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of an adapter folder with the adapter in place, in eval mode on the CPU; classifiers too.

    Args:
        dtype: of the parameters; None: as the model's are stored (a classifier: float32).
    Raises:
        LostError: the folder or its model is not there, not complete, or another one.
    """
    folder = Path(folder)
    facts = read_adapter_facts(folder)
    source = base_of(folder, facts)
    if facts.task != "classification":
        return add_stored_adapter(load_model(source, "cpu", dtype).model, folder).eval()
    model = classifier(locate(source), Head(tuple(facts.label_names)), dtype or torch.float32)
    return add_stored_adapter(model, folder, head_modules(model)).eval()
