"""Reading YAML that may be wrong or made to do harm: plain values only, of limited size."""

from pathlib import Path
from typing import Any

import yaml

MAX_CONFIG_BYTES = 1_000_000
MAX_DEPTH = 50
"""Mappings and lists of a config within each other."""
MAX_DIGITS = 100
"""Characters of an integer, which may be binary."""


class ConfigError(ValueError):
    """A configuration that cannot be run; each line of the message names a key, what was given and what is allowed."""


def read_limited(path: Path, limit: int) -> str:
    """The text of a file; raises OSError, or ValueError if it has more than `limit` bytes or is no UTF-8."""
    with open(path, "rb") as file:
        content = file.read(limit + 1)  # of a device there is no size to be asked for
    if len(content) > limit:
        raise ValueError(f"larger than {limit:,} bytes")
    return content.decode("utf-8")


class _ConfigLoader(yaml.SafeLoader):
    """Reads plain values only, with nothing that grows beyond its text or that is lost in silence."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        place = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases (*) are not allowed: write the value again", place)
        if self.depth == MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"at most {MAX_DEPTH} levels are allowed", place)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a text", key_node.start_mark)
            if key in mapping:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice", key_node.start_mark)
            mapping[key] = self.construct_object(value_node, deep=True)
        return mapping

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        number = super().construct_yaml_int(node) if len(node.value) <= MAX_DIGITS else 2**63
        if abs(number) >= 2**63:
            raise yaml.constructor.ConstructorError(None, None, "allowed are integers of 64 bits", node.start_mark)
        return number


_ConfigLoader.add_constructor("tag:yaml.org,2002:int", _ConfigLoader.construct_integer)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text, read safely; raises ConfigError naming `where`."""
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{where}: larger than {MAX_CONFIG_BYTES:,} bytes")
    try:
        return _ConfigLoader(text).get_single_data()
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).replace(' in "<unicode string>",', " at").split())
        raise ConfigError(f"{where}: not valid YAML ({reason})") from error
