"""The schema and the packaged YAML files agree, and every field says what it means."""

import dataclasses
from typing import get_type_hints

import pytest
import yaml

from lost.config import finetune, schema
from lost.config.choices import ROOTS, config_folder, known_keys, read_root
from lost.config.section import Section, choices_of, is_section, rule_of, setting

SECTIONS = sorted(
    {
        item
        for item in (*vars(schema).values(), *vars(finetune).values())
        if isinstance(item, type) and issubclass(item, Section) and item is not Section
    },
    key=lambda section: section.__name__,
)
FILES = sorted(path.relative_to(config_folder()).with_suffix("").as_posix() for path in config_folder().rglob("*.yaml"))
GROUP_FILES = [name for name in FILES if "/" in name and not name.startswith("experiment/")]
# Where a choice means another default than its base section.
OWN_DEFAULTS = {
    "parameterization/lost": {"lost_rank"},
    "data/c4": {"tokenizer", "row_maker"},
    "data/stdlib": {"validation_fraction"},
}


def content_of(name: str) -> dict:
    return yaml.safe_load((config_folder() / f"{name}.yaml").read_text()) or {}


def section_of(name: str) -> type[Section]:
    """The section that a group's file fills."""
    group, choice = name.split("/")
    hint = {**get_type_hints(finetune.FinetuneConfig), **get_type_hints(schema.PretrainConfig)}[group]
    return choices_of(hint).get(choice, hint)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_section_and_field_has_a_doc(section):
    assert section.__doc__
    assert not section.__doc__.startswith(f"{section.__name__}(")
    for item in dataclasses.fields(section):
        assert rule_of(item).doc.strip(), f"{section.__name__}.{item.name} has no doc"


@pytest.mark.parametrize("name", GROUP_FILES)
def test_a_choice_file_has_exactly_the_keys_of_its_section(name):
    assert set(content_of(name)) == {item.name for item in dataclasses.fields(section_of(name))}


@pytest.mark.parametrize("name", GROUP_FILES)
def test_a_choice_file_does_not_contradict_the_schema(name):
    if name.startswith("model/"):
        return
    content = content_of(name)
    for item in dataclasses.fields(section_of(name)):
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        is_free = default is dataclasses.MISSING or item.name == "name" or item.name in OWN_DEFAULTS.get(name, ())
        assert is_free or content[item.name] == default, f"{name}: {item.name}"


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("experiment/")])
def test_an_experiment_names_itself_and_known_keys_only(name):
    content = content_of(name)
    assert content.pop("experiment") == name.partition("/")[2]
    content.pop("defaults", None)
    for key, value in content.items():
        keys = [f"{key}.{inner}" for inner in value] if isinstance(value, dict) else [key]
        assert set(keys) <= set(known_keys("pretrain"))


@pytest.mark.parametrize("command", ROOTS)
def test_a_root_file_has_every_key_of_its_command(command):
    section, root = ROOTS[command]
    content = dict(read_root(root))
    chosen = {group for entry in content.pop("defaults", []) if isinstance(entry, dict) for group in entry}
    assert set(content) | chosen == {item.name for item in dataclasses.fields(section)}
    for key, hint in get_type_hints(section).items():
        if is_section(hint) and key in content:
            assert set(content[key]) == {item.name for item in dataclasses.fields(hint)}


def test_numbers_must_be_finite():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Rate(Section):
        """A rate."""

        rate: float = setting("a rate", 1.0)

    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be a finite number"):
            Rate(rate=value)
    assert Rate(rate=1).rate == 1.0
    with pytest.raises(ValueError, match="must be a number"):
        Rate(rate=True)
