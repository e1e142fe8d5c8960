"""What the keys of a configuration are: checked, with faults told by key, and listed for help texts."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from distributed.yaml_text import ConfigError

DEFAULT_NAMES = {"oracle": "tfbind8", "network": "mlp", "generator": "gflownet"}
"""Sections whose key `name` says which keys the others are, and what it is by default."""
MAX_FAULTS, MAX_SHOWN = 20, 200
"""Faults that a message names, and characters of a faulty value that it repeats."""

Section = TypeVar("Section", bound=BaseModel)


def validate_section(model: type[Section], name: str, values: Any) -> Section:
    """`values` as a `model`, whose keys messages name with `name` before them; raises ConfigError."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        prefix = f"{name}." if name else ""
        found = error.errors()
        faults = "\n".join(prefix + _explain(fault, values, model) for fault in found[:MAX_FAULTS])
        if len(found) > MAX_FAULTS:
            faults += f"\nand {len(found) - MAX_FAULTS:,} more"
        raise ConfigError(without_credentials(faults)) from error


def without_credentials(text: str) -> str:
    """`text` with the user part of every address in it masked, and values of its query that look like secrets."""
    text = re.sub(r"://([^/\s]*|[^/@\s]*:[^\s]*)@", "://***@", text)
    return re.sub(r"(?i)([?&][a-z_-]*(?:password|passwd|token|secret|key)=)[^&\s'\"]+", r"\1***", text)


def _explain(fault: ErrorDetails, values: dict[str, Any], model: type[BaseModel]) -> str:
    location = [str(part) for part in fault["loc"]]
    for number in range(len(location) - 1, 0, -1):
        if location[number - 1] in DEFAULT_NAMES:
            location.pop(number)  # the tag of the union is not part of the key
    key = ".".join(shortened(part) for part in location if "[" not in part)  # nor are the members of a union of types
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        section = _section_model(location[:-1], values, model)
        return f"{key}: unknown key; allowed: {', '.join(section.model_fields) if section else 'see --help'}"
    if fault["type"] == "union_tag_invalid":
        return f"{key}.name: got {shortened(repr(fault['ctx']['tag']))}; allowed: {fault['ctx']['expected_tags']}"
    if fault["type"] == "union_tag_not_found":
        return f"{key}.name: missing or null; allowed: a name"
    if fault["type"] == "missing":
        return f"{key}: missing; it has no default"
    if fault["type"] == "value_error" and isinstance(fault["input"], dict):
        return f"{key}: {message}" if key else message
    return f"{key}: got {shortened(repr(fault['input']))}; {message[:1].lower()}{message[1:]}"


def shortened(text: str) -> str:
    """`text`, of a long one both ends."""
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN // 2]} … {text[-MAX_SHOWN // 2 :]}"


def _section_model(location: list[str], values: dict[str, Any], model: type[BaseModel]) -> type[BaseModel] | None:
    node: dict[str, Any] = values
    current = model
    for name in location:
        node = node.get(name, {})
        models = _models_of(current.model_fields[name].annotation) if name in current.model_fields else []
        tagged = [m for m in models if node.get("name") in (None, *_literals(m))]
        if not tagged:
            return None
        current = tagged[0]
    return current


def _models_of(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_of(part)]


def _literals(model: type[BaseModel]) -> tuple[Any, ...]:
    field = model.model_fields.get("name")
    return getattr(field.annotation, "__args__", (None,)) if field else (None,)


def describe_fields(
    model: type[BaseModel], prefix: str = "", defaults: BaseModel | None = None
) -> Iterator[tuple[str, str, str]]:
    """(key, default, description) of every config field, for help texts; `defaults`: an instance that holds them."""
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True) if defaults is None else getattr(defaults, name)
        inner = _models_of(field.annotation)
        if inner:
            place = f"{prefix}{name}.KEY." if get_origin(field.annotation) is dict else f"{prefix}{name}."
            for part in inner:
                tag = f" [{_literals(part)[0]}]" if len(inner) > 1 else ""
                held = default if isinstance(default, part) else None
                for key, shown, text in describe_fields(part, place, held):
                    yield key, shown, text + tag
        else:
            required = field.is_required() and defaults is None
            shown = "required" if required else yaml.safe_dump(_plain(default)).split("\n...")[0].strip()
            yield f"{prefix}{name}", shown, " ".join((field.description or "").split())


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
