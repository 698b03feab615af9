"""The model card (README.md) of an exported model: what it is, how it was trained, how to load it."""

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

CITATION = """```bibtex
@misc{lost2025,
  title = {LOST: Low-rank and Sparse Pre-training for Large Language Models},
  year = {2025},
  eprint = {2508.02668},
  archivePrefix = {arXiv}
}
```"""


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What the weights alone do not say.

    Attributes:
        name: title of the card.
        parameterization: its name and settings, as in the configuration.
        num_parameters: trained parameters of this model.
        num_dense_parameters: what the same architecture has with plain linear layers.
        data: what it was trained on, in words.
        steps: optimizer steps done.
        tokens_seen: label tokens trained on, padding left out.
        seq_len: tokens of a training row.
        global_batch_size: rows of an optimizer step.
        learning_rate: the peak.
        optimizer: its name.
        schedule: its name.
        seed: of initial weights and row order.
        validation: for each set perplexity, perplexity_lineage, lineage_note and num_tokens; empty if not evaluated.
        versions: of the packages that trained it.
    """

    name: str
    parameterization: dict[str, Any]
    num_parameters: int
    num_dense_parameters: int
    data: str
    steps: int
    tokens_seen: int
    seq_len: int
    global_batch_size: int
    learning_rate: float
    optimizer: str
    schedule: str
    seed: int
    validation: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def model_card(config: PreTrainedConfig, facts: CardFacts) -> str:
    """The text of README.md, with the header that the Hugging Face hub reads."""
    sections = [
        header(facts),
        f"# {facts.name}",
        method(facts),
        f"## Use\n\n{usage(facts)}",
        f"## Architecture\n\n{architecture(config, facts)}",
        f"## Training\n\n{training(facts)}",
        f"## Validation\n\n{validation(facts)}",
        "## Limits\n\nA research model: not aligned, not filtered, and only as good as the data above.",
        f"## Citation\n\n{CITATION}",
    ]
    return "\n\n".join(sections) + "\n"


def is_lost(facts: CardFacts) -> bool:
    return facts.parameterization.get("name") == "lost"


def header(facts: CardFacts) -> str:
    # Whoever publishes the weights chooses their licence: it depends on the data.
    tags = ["llama", "pretraining"] + (["lost", "low-rank", "sparse"] if is_lost(facts) else [])
    lines = ["license: unknown", "library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    return "\n".join(["---", *lines, *[f"- {tag}" for tag in tags], "---"])


def method(facts: CardFacts) -> str:
    if not is_lost(facts):
        return "A dense LLaMA (plain linear layers), pre-trained with `lost` as a baseline of LOST (arXiv 2508.02668)."
    share = facts.num_parameters / facts.num_dense_parameters
    return (
        "A LLaMA whose attention and MLP projections were pre-trained in LOST form (arXiv 2508.02668): each is\n"
        "`gamma * act(x A^T) B^T + (1 - gamma) * x[:, I] W_s^T`, low-rank factors plus a trained dense block of a few\n"
        f"kept channels. It has {share:.0%} of the parameters of the dense model of the same width and depth."
    )


def usage(facts: CardFacts) -> str:
    registration = "import lost.model  # registers the model type\n" if is_lost(facts) else ""
    return (
        f"```python\n{registration}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n```\n\n"
        "or `lost generate source=<folder> prompt='...'`, `lost evaluate source=<folder>`."
    )


def table(rows: list[tuple[str, Any]]) -> str:
    return "\n".join(["| | |", "|---|---|", *[f"| {name} | {value} |" for name, value in rows]])


def architecture(config: PreTrainedConfig, facts: CardFacts) -> str:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    rows: list[tuple[str, Any]] = [
        (name, getattr(config, name)) for name in (*names, "vocab_size", "max_position_embeddings")
    ]
    rows += [
        ("parameters", f"{facts.num_parameters:,} ({facts.num_parameters / 1e6:.2f} M)"),
        ("dense would have", f"{facts.num_dense_parameters:,} ({facts.num_dense_parameters / 1e6:.2f} M)"),
        ("parameterization", facts.parameterization.get("name")),
    ]
    rows += [
        (name, value) for name, value in facts.parameterization.items() if name != "name" and value not in ({}, [])
    ]
    return table(rows)


def training(facts: CardFacts) -> str:
    rows: list[tuple[str, Any]] = [
        ("data", facts.data),
        ("steps", f"{facts.steps:,}"),
        ("tokens seen (without padding)", f"{facts.tokens_seen:,}"),
        ("tokens a row", facts.seq_len),
        ("rows a step", facts.global_batch_size),
        ("optimizer", facts.optimizer),
        ("peak learning rate", f"{facts.learning_rate:g}"),
        ("schedule", facts.schedule),
        ("seed", facts.seed),
    ]
    if facts.versions:
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in facts.versions.items())))
    return table(rows)


def validation(facts: CardFacts) -> str:
    if not facts.validation:
        return "Not evaluated."
    lines = [
        "| set | tokens | perplexity (exact) | perplexity (the papers' formula, reads too low) |",
        "|---|---|---|---|",
    ]
    notes = []
    for name, result in facts.validation.items():
        numbers = " | ".join(number(result[key]) for key in ("perplexity", "perplexity_lineage"))
        lines.append(f"| {name} | {result['num_tokens']:,} | {numbers} |")
        notes.append(f"- {name}: {result['lineage_note']}.")
    exact = "Exact: exp(sum of token losses / number of predicted tokens)."
    return "\n".join([*lines, "", exact, "", *notes])


def number(value: float | None) -> str:
    """Three decimals; metrics.jsonl keeps what is not finite as null."""
    return "not finite" if value is None else f"{value:.3f}"
