"""Recipes: types, overrides, sentences for slips, and TOML that reads back."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pytest
import tomllib
from hypothesis import given
from hypothesis import strategies as st

from glomo.errors import UserError
from glomo.training.compare import SCHEMAS
from glomo.training.config import (
    Text,
    build,
    convert,
    describe,
    dump_toml,
    load_recipe,
    recipe_names,
    split_arguments,
    to_dict,
)
from glomo.training.finetune_config import FinetuneConfig
from glomo.training.language import LanguageConfig
from glomo.training.pretrain import PretrainConfig
from glomo.training.study import StudyConfig
from glomo.training.transfer_config import TransferConfig
from glomo.training.translation import TranslationConfig


@dataclass(frozen=True)
class Net:
    width: int = 8
    """how wide"""
    rate: float = 0.1
    units: int = 0

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "Net":
        assert name == "wide"
        return cls(**{"width": 99, **changes})


@dataclass(frozen=True)
class Run:
    name: str = "x"
    quiet: bool = False
    kind: Literal["a", "b"] = "a"
    limit: int | None = None
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Schema:
    DERIVED: ClassVar = {"net": ("units",)}

    net: Net = field(default_factory=lambda: Net(rate=0.5))
    run: Run = field(default_factory=Run)


def recipe(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return str(path)


def test_values_come_from_defaults_then_the_recipe_then_the_command_line(tmp_path):
    path = recipe(tmp_path, 'command = "c"\nabout = "a"\n[net]\nwidth = 3\n[run]\nsizes = [4]\nlimit = "none"\n')
    options = split_arguments(["--run.quiet", "--net.width=5", "--run.kind", "b", "--run.limit", "7"]).options
    config = load_recipe(path, options, Schema, "c")
    assert config == Schema(Net(5, 0.5), Run(quiet=True, kind="b", limit=7, sizes=(4,)))


def test_a_preset_is_the_start_that_the_other_keys_change():
    assert build(Schema, {"net": {"preset": "wide", "rate": 1}}, "r").net == Net(99, 1.0)


def test_the_command_line_is_taken_apart():
    found = split_arguments(["name", "--a.b-c", "-1", "--out=x y", "--t.on", "--help"])
    assert found.positional == ["name"]
    assert found.options == {"a.b_c": "-1", "out": "x y", "t.on": "true", "help": "true"}
    with pytest.raises(UserError, match="--out needs a value"):
        split_arguments(["--out"])


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("12", int, 12),
        ("1e3", int, 1000),
        ("3e-3", float, 0.003),
        ("2", float, 2.0),
        ("no", bool, False),
        ("TRUE", bool, True),
        ("none", int | None, None),
        ("4", int | None, 4),
        ("1, 2,", tuple[int, ...], (1, 2)),
        ("", tuple[str, ...], ()),
        ("none", str, "none"),
        ("b", Literal["a", "b"], "b"),
    ],
)
def test_text_becomes_what_the_field_needs(text, kind, value):
    made = convert(Text(text), kind, "k")
    assert made == value
    assert type(made) is type(value)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (Text("1.5"), int),
        (Text("x"), float),
        (Text("2"), bool),
        (True, int),
        ("3", int),
        (1, str),
        (Text("c"), Literal["a"]),
    ],
)
def test_a_wrong_type_names_key_value_and_need(value, kind):
    with pytest.raises(UserError, match=r"net\.width.*'?(1\.5|x|2|True|3|1|c)'?.*(needed|known)"):
        convert(value, kind, "net.width")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[net]\nwidht = 3", "unknown key net.widht.*nearest known one is net.width"),
        ("[nett]\nwidth = 3", r"unknown section \[nett\].*nearest known one is net"),
        ("[net]\nquiet = true", "unknown key net.quiet.*run.quiet"),
        ("[net]\nunits = 3", "unknown key net.units"),  # derived from the data
        ("net = 3", "must be a section"),
        ("[net\n", "not valid TOML"),
        ('command = "d"', "is for `glomo d`"),
    ],
)
def test_a_slip_in_a_recipe_is_a_sentence(tmp_path, text, sentence):
    with pytest.raises(UserError, match=sentence):
        load_recipe(recipe(tmp_path, text), {}, Schema, "c")


def test_unknown_recipes_and_options_name_the_nearest(tmp_path):
    with pytest.raises(UserError, match="nearest known one is graph-tiny"):
        load_recipe("graph-tini", {}, PretrainConfig, "pretrain")
    with pytest.raises(UserError, match="no recipe file"):
        load_recipe(str(tmp_path / "no.toml"), {}, PretrainConfig, "pretrain")
    with pytest.raises(UserError, match=r"--widht.*--net\.width"):
        load_recipe(recipe(tmp_path, ""), {"widht": "3"}, Schema, "c")
    (tmp_path / "latin.toml").write_bytes(b'about = "\xe9"')
    with pytest.raises(UserError, match="not UTF-8"):
        load_recipe(str(tmp_path / "latin.toml"), {}, Schema, "c")


plain = st.one_of(
    st.text(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.booleans(),
    st.lists(st.integers(0, 9)),
)


@given(st.dictionaries(st.sampled_from("abc"), st.dictionaries(st.sampled_from("xyz"), plain)))
def test_toml_reads_back(sections):
    assert tomllib.loads(dump_toml(sections)) == sections


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_valid_and_resolve_to_themselves(name, tmp_path):
    from glomo.training.config import read_recipe

    raw = read_recipe(name)
    assert raw["about"]
    schema = {
        "pretrain": PretrainConfig,
        "transfer": TransferConfig,
        "study": StudyConfig,
        "translate": TranslationConfig,
        "lm": LanguageConfig,
        "finetune": FinetuneConfig,
        "compare": SCHEMAS[raw.get("compare", {}).get("of", "finetune")],
    }[raw["command"]]
    config = load_recipe(name, {}, schema, raw["command"])
    resolved = recipe(tmp_path, dump_toml(to_dict(config)))
    again = load_recipe(resolved, {}, schema, raw["command"])
    assert to_dict(again) == to_dict(config)


def test_help_has_every_key_with_its_value_and_meaning():
    text = describe(Schema())
    assert "--net.width 8" in text
    assert "how wide" in text
    assert '--run.limit "none"' in text
    assert "units" not in text
    for section in dataclasses.fields(PretrainConfig):
        assert f"--{section.name}." in describe(PretrainConfig())
