"""The model card (README.md) of an exported model: what it is, how it was trained, how to load it."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml
from transformers import PreTrainedConfig

Form = Literal["lost", "dense", "self_contained"]
# What the card of a converted model points to.
CONVERSION_REPORT, CONVERSION_PICTURE = "conversion.json", "conversion.png"
CAUSAL_LM = "AutoModelForCausalLM"
LOST_TAGS = ["lost", "low-rank", "sparse"]
_HEADER = re.compile(r"---\n(.*?)^---\n", re.MULTILINE | re.DOTALL)
REGISTRATION = "import lost.model  # registers the model type\n"

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
        form: of the weights in the folder; None: that of the parameterization.
        license: its name on the hub.
        evaluations: lines of Markdown about what `lost evaluate` found.
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
    form: Form | None = None
    # Whoever publishes the weights chooses their licence: it depends on the data.
    license: str = "unknown"
    evaluations: list[str] = field(default_factory=list)


def model_card(config: PreTrainedConfig, facts: CardFacts) -> str:
    """The text of README.md, with the header that the Hugging Face hub reads."""
    sections = [
        header(facts),
        f"# {facts.name}",
        method(facts),
        f"## Use\n\n{usage(form_of(facts))}",
        f"## Architecture\n\n{architecture(config, facts)}",
        f"## Training\n\n{training(facts)}",
        f"## Validation\n\n{validation(facts)}",
        *([f"## Evaluation\n\n{evaluation(facts.evaluations)}"] if facts.evaluations else []),
        "## Limits\n\nA research model: not aligned, not filtered, and only as good as the data above.",
        f"## Citation\n\n{CITATION}",
    ]
    return "\n\n".join(sections) + "\n"


def adapted_card(
    card: str,
    form: Form,
    license_name: str,
    evaluations: list[str],
    *,
    num_multiplied_out: int = 0,
    auto_name: str = CAUSAL_LM,
) -> str:
    """A card that came with a model, for the form in which the model is now: use, licence and evaluation are new.

    Args:
        num_multiplied_out: LOST layers that are one matrix each in this folder, while the card is of their LOST form.
        auto_name: of the class of transformers that loads the folder.
    """
    if num_multiplied_out:
        card = with_section(without_lost_tags(card), "Form", multiplied_out(num_multiplied_out))
    card = with_section(card, "Use", usage(form, auto_name))
    card = with_section(card, "Evaluation", evaluation(evaluations)) if evaluations else card
    return with_license(card, license_name) if license_name else card


def with_section(card: str, title: str, text: str) -> str:
    """The card with the section of this title replaced, or appended where there is none."""
    section = f"## {title}\n\n{text}\n"
    found = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if found.search(card):
        return found.sub(lambda _: f"{section}\n", card, count=1).rstrip("\n") + "\n"
    return card.rstrip("\n") + f"\n\n{section}"


class _HeaderLoader(yaml.SafeLoader):
    """With the booleans of YAML 1.2 only: `language: no` is Norwegian."""


_BOOL = "tag:yaml.org,2002:bool"
_HeaderLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_HeaderLoader.add_implicit_resolver(_BOOL, re.compile("true|false", re.IGNORECASE), list("tTfF"))


def split_card(card: str) -> tuple[dict[str, Any], str]:
    """(the fields of a card's header, the rest); a header that is no YAML has no fields."""
    card = card.replace("\r\n", "\n")
    found = _HEADER.match(card)
    if found is None:
        return {}, card
    try:
        header = yaml.load(found[1], Loader=_HeaderLoader)
    except yaml.YAMLError:
        header = None
    return header if isinstance(header, dict) else {}, card[found.end() :].lstrip("\n")


def joined_card(header: dict[str, Any], text: str) -> str:
    fields = yaml.safe_dump(header, sort_keys=False, allow_unicode=True)
    return f"---\n{fields}---\n\n{text}"


def license_fields(card: str) -> dict[str, Any]:
    """What a card's header says of the licence; unknown where it says nothing."""
    header, _ = split_card(card)
    found = {key: header[key] for key in ("license", "license_name", "license_link") if header.get(key)}
    return {"license": "unknown"} | found


def with_license(card: str, name: str) -> str:
    """The card with this licence in its header, and no name or link of another."""
    header, text = split_card(card)
    others = {key: value for key, value in header.items() if key not in ("license", "license_name", "license_link")}
    return joined_card({"license": name} | others, text)


def without_lost_tags(card: str) -> str:
    """The card without the tags of the LOST form."""
    header, text = split_card(card)
    tags = header.get("tags")
    if not isinstance(tags, list) or "lost" not in tags:
        return card
    return joined_card(header | {"tags": [tag for tag in tags if tag not in LOST_TAGS]}, text)


def multiplied_out(num_layers: int) -> str:
    return (
        f"This folder holds the model in dense form: each of its {num_layers} LOST layers is multiplied out to one"
        " matrix.\nWhat this card says of ranks and numbers of parameters is about the LOST form that it was made from."
    )


def is_lost(facts: CardFacts) -> bool:
    return facts.parameterization.get("name") == "lost"


def form_of(facts: CardFacts) -> Form:
    return facts.form or ("lost" if is_lost(facts) else "dense")


def header(facts: CardFacts) -> str:
    tags = ["llama", "pretraining"] + (LOST_TAGS if form_of(facts) != "dense" else [])
    lines = [f"license: {facts.license}", "library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    return "\n".join(["---", *lines, *[f"- {tag}" for tag in tags], "---"])


def method(facts: CardFacts) -> str:
    if not is_lost(facts):
        return "A dense LLaMA (plain linear layers), pre-trained with `lost` as a baseline of LOST (arXiv 2508.02668)."
    share = facts.num_parameters / facts.num_dense_parameters
    text = (
        "A LLaMA whose attention and MLP projections were pre-trained in LOST form (arXiv 2508.02668): each is\n"
        "`gamma * act(x A^T) B^T + (1 - gamma) * x[:, I] W_s^T`, low-rank factors plus a trained dense block of a few\n"
        f"kept channels. In this form it has {share:.0%} of the parameters of the dense model of its width and depth."
    )
    if form_of(facts) == "dense":
        text += "\nThis folder holds it in dense form: each projection multiplied out to one matrix."
    return text


def usage(form: Form, auto_name: str = CAUSAL_LM) -> str:
    """How to load the folder, by the class of transformers of that name."""
    registration = REGISTRATION if form == "lost" else ""
    option = ", trust_remote_code=True" if form == "self_contained" else ""
    commands = "\n\nor `lost generate source=<folder> prompt='...'`, `lost evaluate source=<folder>`."
    return (
        f"```python\n{registration}from transformers import {auto_name}, AutoTokenizer\n\n"
        f"model = {auto_name}.from_pretrained(folder{option})\n"
        f"tokenizer = AutoTokenizer.from_pretrained(folder)\n```{commands if auto_name == CAUSAL_LM else ''}"
    )


def evaluation(lines: list[str]) -> str:
    return "\n".join(lines)


def table(rows: list[tuple[str, Any]]) -> str:
    return "\n".join(["| | |", "|---|---|", *[f"| {name} | {value} |" for name, value in rows]])


def architecture(config: PreTrainedConfig, facts: CardFacts) -> str:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    rows: list[tuple[str, Any]] = [
        (name, getattr(config, name)) for name in (*names, "vocab_size", "max_position_embeddings")
    ]
    is_multiplied_out = is_lost(facts) and form_of(facts) == "dense"
    rows += [
        (
            "parameters in LOST form" if is_multiplied_out else "parameters",
            f"{facts.num_parameters:,} ({facts.num_parameters / 1e6:.2f} M)",
        ),
        (
            "parameters" if is_multiplied_out else "dense would have",
            f"{facts.num_dense_parameters:,} ({facts.num_dense_parameters / 1e6:.2f} M)",
        ),
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
