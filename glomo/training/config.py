"""Recipes: TOML text -> nested plain dataclasses, with typed ``--section.key value`` overrides.

A *schema* is a dataclass whose fields are sections, each section a dataclass of plain values (``str int float bool``,
``tuple[...]`` of one of them, ``Literal``, or one of these ``| None``). A recipe is a TOML file that says for which
command it is, what it does, and the values that differ from the defaults::

    command = "pretrain"
    about = "what this recipe does, in one line"

    [train]
    steps = 800

TOML has no null: ``"none"`` stands for None where a field may be None. A section class with a ``preset`` class method
takes the key ``preset``: its values are the start, the section's other keys replace them. The string below a field is
its help. A schema's class attribute ``DERIVED`` ({section: keys}) names fields that follow from the data: they are no
keys.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import json
import math
import sys
import textwrap
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from glomo.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:  # setup.py: 'tomli; python_version < "3.11"'
    import tomli as tomllib

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
Schema = TypeVar("Schema")


@dataclass(frozen=True)
class Arguments:
    """A command line taken apart: what stands free, and the ``--name value`` pairs in their order."""

    positional: list[str]
    options: dict[str, str]


def split_arguments(argv: Sequence[str], flags: Sequence[str] = ("help",)) -> Arguments:
    """Take ``free --a.b value --c=value --flag`` apart. ``-h`` is ``--help``; a hyphen in a name equals an underscore.

    Names in ``flags`` take no value (they become "true"); so does a dotted name at the end or before another option.
    """
    positional: list[str] = []
    options: dict[str, str] = {}
    rest = ["--help" if word == "-h" else word for word in argv]
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            positional.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name in flags and not equals:
            value = "true"
        elif not equals:
            if rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            elif "." in name:
                value = "true"  # a bare switch; anything but a bool will refuse it by name
            else:
                raise UserError(f"--{name} needs a value after it")
        options[name] = value
    return Arguments(positional, options)


def check_range(key: str, value: float, least: float, most: float = math.inf) -> None:
    """Raise UserError unless ``value`` is finite and from ``least`` to ``most``, both included."""
    if not (least <= value <= most and value < math.inf):  # "not" also catches NaN
        needed = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise UserError(f"{key} is {value}; it must be a finite number {needed}")


def recipe_names() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def recipe_path(name_or_path: str) -> Path:
    """The file behind a recipe's name, or the path itself when it names a file."""
    shipped = RECIPES / f"{name_or_path}.toml"
    if "/" not in name_or_path and shipped.is_file():
        return shipped
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.suffix == ".toml" or "/" in name_or_path:
        raise UserError(f"there is no recipe file {name_or_path}")
    raise UserError(f"there is no recipe {name_or_path!r}{nearest(name_or_path, recipe_names())}")


def read_recipe(name_or_path: str) -> dict[str, Any]:
    """The recipe's TOML as nested dictionaries, unchecked."""
    return read_toml(recipe_path(name_or_path))


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None


def load_recipe(name_or_path: str, overrides: Mapping[str, str], schema: type[Schema], command: str) -> Schema:
    """The recipe as an instance of ``schema``, with ``overrides`` ({"train.steps": "60"}) on top.

    Raises UserError for an unknown recipe, section or key (naming the nearest known one), for a value of the wrong
    type, and for a recipe that belongs to another command.
    """
    recipe = read_recipe(name_or_path)
    meant_for = recipe.pop("command", command)
    if meant_for != command:
        raise UserError(f"recipe {name_or_path} is for `glomo {meant_for}`, not for `glomo {command}`")
    recipe.pop("about", None)
    for name, text in overrides.items():
        section, dot, key = name.partition(".")
        if not dot:
            known = [f"{s}.{k}" for s, keys in schema_keys(schema).items() for k in keys]
            raise UserError(f"unknown option --{name}{nearest(name, known, '--')}")
        if not isinstance(recipe.setdefault(section, {}), dict):
            raise UserError(f"{section!r} in recipe {name_or_path} must be a section, written [{section}]")
        recipe[section][key] = Text(text)
    return build(schema, recipe, f"recipe {name_or_path}")


class Text(str):
    """A value as typed on the command line, whose type only the field it goes to can tell."""


def schema_keys(schema: type) -> dict[str, dict[str, Any]]:
    """{section: {key: its type}} of a schema, ``preset`` included where a section has one."""
    sections: dict[str, dict[str, Any]] = {}
    for name, cls in _sections(schema).items():
        hints = get_type_hints(cls)
        derived = getattr(schema, "DERIVED", {}).get(name, ())
        keys = {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.name not in derived}
        sections[name] = {"preset": str, **keys} if hasattr(cls, "preset") else keys
    return sections


def _sections(schema: type) -> dict[str, type]:
    hints = get_type_hints(schema)
    return {f.name: hints[f.name] for f in dataclasses.fields(schema)}


def build(schema: type[Schema], values: Mapping[str, Any], where: str) -> Schema:
    """Check ``values`` ({section: {key: value}}) against the schema and make an instance of it."""
    keys = schema_keys(schema)
    for section, content in values.items():
        if section not in keys:
            raise UserError(f"unknown section [{section}] in {where}{nearest(section, list(keys))}")
        if not isinstance(content, Mapping):
            raise UserError(f"{section!r} in {where} must be a section, written [{section}]")
        for key in content:
            if key not in keys[section]:
                # the same key in another section is a likelier slip than a similar key in this one
                elsewhere = [f"{other}.{key}" for other in keys if key in keys[other]]
                known = elsewhere or [f"{section}.{k}" for k in keys[section]]
                raise UserError(f"unknown key {section}.{key} in {where}{nearest(f'{section}.{key}', known)}")
    made = {}
    defaults = schema()
    for section, cls in _sections(schema).items():
        given = {
            key: convert(value, keys[section][key], f"{section}.{key}")
            for key, value in values.get(section, {}).items()
        }
        preset = given.pop("preset", None)
        start = getattr(defaults, section)
        made[section] = dataclasses.replace(start, **given) if preset is None else cls.preset(preset, **given)  # type: ignore[attr-defined]
    return schema(**made)


def convert(value: Any, needed: Any, key: str) -> Any:
    """``value`` (from TOML, or Text from the command line) as the type ``needed``; UserError names all three."""
    origin, inner = get_origin(needed), get_args(needed)
    if origin in (Union, types.UnionType):
        if isinstance(value, str) and value.lower() == "none" and type(None) in inner:
            return None
        return convert(value, next(kind for kind in inner if kind is not type(None)), key)
    if origin is Literal:
        if str(value) not in [str(choice) for choice in inner]:
            raise UserError(f"{key} is {str(value)!r}{nearest(str(value), [str(choice) for choice in inner])}")
        return next(choice for choice in inner if str(choice) == str(value))
    if origin is tuple:
        if isinstance(value, str):
            value = [
                Text(part.strip()) if isinstance(value, Text) else part for part in value.split(",") if part.strip()
            ]
        if not isinstance(value, (list, tuple)):
            value = [value]
        return tuple(convert(part, inner[0], key) for part in value)
    made = _from_text(value, needed) if isinstance(value, Text) else _from_toml(value, needed)
    if made is None:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise UserError(f"{key} is {_show(value)}, but {names[needed]} is needed")
    return made


def _from_text(text: str, needed: type) -> Any:
    if needed is str:
        return str(text)
    if needed is bool:
        return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(text.lower())
    try:
        if needed is float:
            return float(text)
        return int(float(text)) if "e" in text.lower() and float(text).is_integer() else int(text)
    except (ValueError, OverflowError):
        return None


def _from_toml(value: Any, needed: type) -> Any:
    if needed is float and type(value) is int:
        return float(value)
    return value if type(value) is needed else None


def _show(value: Any) -> str:
    return repr(str(value)) if isinstance(value, str) else repr(value)


def nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
    """The end of a sentence about an unknown ``name``: the nearest known one, or all of them when none is near."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; the nearest known one is {prefix}{close[0]}"
    return f"; known are {', '.join(known)}" if known else ""


def to_dict(config: Any) -> dict[str, dict[str, Any]]:
    """The resolved configuration as {section: {key: plain value}}, derived keys left out; tuples become lists."""
    keys = schema_keys(type(config))
    return {
        section: {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in content.items()
            if key in keys[section]
        }
        for section, content in dataclasses.asdict(config).items()
    }


def default_values(config: Any) -> dict[str, dict[str, Any]]:
    """`to_dict` of a configuration of the same schema in which nothing was chosen."""
    return to_dict(type(config)())


def dump_toml(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """``{section: {key: value}}`` as TOML text that ``tomllib`` reads back to the same values (None as "none")."""
    return "\n".join(
        f"[{section}]\n" + "".join(f"{key} = {_toml(value)}\n" for key, value in content.items())
        for section, content in sections.items()
    )


def _toml(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(part) for part in value) + "]"
    if isinstance(value, str):  # JSON's escapes are TOML's, but for DEL, which TOML wants escaped too
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value)


def describe(config: Any) -> str:
    """One line a key: ``--section.key value   meaning``; what ``glomo <command> RECIPE --help`` prints."""
    rows: list[tuple[str, str]] = []
    meanings = {section: _meanings(cls) for section, cls in _sections(type(config)).items()}
    for section, content in to_dict(config).items():
        for key, value in content.items():
            rows.append((f"--{section}.{key} {_toml(value)}", meanings[section].get(key, "")))
    width = min(40, max(len(left) for left, _ in rows))
    return "\n".join(f"  {left:<{width}}  {right}".rstrip() for left, right in rows)


def _meanings(cls: type) -> dict[str, str]:
    """{field: the string written below it in the source of the class, or of one that it extends}."""
    if cls is object:
        return {}
    found = _meanings(cls.__bases__[0])
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    except OSError:  # no source at hand, as in a frozen application
        return found
    assert isinstance(body, ast.ClassDef)
    for line, below in zip(body.body, body.body[1:], strict=False):
        is_field = isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
        if is_field and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[line.target.id] = " ".join(str(below.value.value).split())  # type: ignore[attr-defined]
    return found
