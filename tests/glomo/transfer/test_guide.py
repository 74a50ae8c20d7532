"""The guide: every command can be read, every page is there."""

import re
import shlex
from pathlib import Path

import pytest

import glomo.transfer
from glomo.training.compare import SCHEMAS
from glomo.training.config import load_recipe, read_recipe, split_arguments
from glomo.training.finetune_config import FinetuneConfig
from glomo.training.language import LanguageConfig
from glomo.training.translation import TranslationConfig

PAGE = Path(glomo.transfer.__file__).with_name("GUIDE.md")
TEXT = PAGE.read_text(encoding="utf-8")
COMMANDS = [line.strip() for line in TEXT.splitlines() if line.startswith("    glomo ")]
RECIPES = {"lm train": (LanguageConfig, "lm"), "finetune": (FinetuneConfig, "finetune")}
RECIPES |= {"compare": (None, "compare"), "translate train": (TranslationConfig, "translate")}


@pytest.mark.parametrize("line", COMMANDS)
def test_commands(line):
    words = shlex.split(line)[1:]
    name = " ".join(words[:2]) if words[0] in ("lm", "translate") or words[1] == "eval" else words[0]
    arguments = split_arguments(words[len(name.split()) :])
    options = {key: value for key, value in arguments.options.items() if key != "out"}
    if name in RECIPES:
        schema, command = RECIPES[name]
        if name == "compare":
            schema = SCHEMAS[read_recipe(arguments.positional[0])["compare"].get("of", "finetune")]
        made = load_recipe(arguments.positional[0], options, schema, command)
        assert made.train.steps > 0
    else:
        assert name in ("probe", "lm eval", "finetune eval")
        assert options.keys() <= {"task", "dataset"}


def test_links_and_options():
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (PAGE.parent / link).is_file(), link
    headings = {re.sub(r"[^a-z ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^## (.+)$", TEXT, re.M)}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= headings
    for option in re.findall(r"`--([a-z]+\.[a-z_]+) ", TEXT):
        section, key = option.split(".")
        assert hasattr(getattr(FinetuneConfig(), section), key), option
