"""Reading YAML, and JSON on the command line: duplicate keys are errors."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from tla_service.errors import ConfigError, without_credentials

_MOST_BYTES, _MOST_VALUES = 10_000_000, 1_000_000


class _Loader(yaml.SafeLoader):
    """Reads numbers as YAML 1.2 does: `010` (octal before) and `1:30` (sexagesimal) stay text, for pydantic to read."""


_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)",
    "tag:yaml.org,2002:float": (
        r"[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
    ),
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would take for a number, such as `1.5e3`."""


for _tag, _pattern in _NUMBERS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list("-+.0123456789"))


def dump_yaml(fields: dict[str, Any]) -> str:
    """Settings as YAML, without credentials in URLs; `parse_yaml` reads them back."""
    return without_credentials(yaml.dump(fields, Dumper=_Dumper, sort_keys=False))


def read_yaml(path: Path, subject: str) -> Any:
    """Read a YAML file in UTF-8, with or without a byte order mark; `subject` is the setting that named it."""
    try:
        with path.expanduser().open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ConfigError(subject, path, f"is larger than {_MOST_BYTES} bytes", "give a file of settings")
        text = content.decode()
    except (OSError, RuntimeError) as error:  # the latter of a home folder that cannot be found
        reason = f"cannot be read ({(getattr(error, 'strerror', None) or str(error)).lower()})"
        raise ConfigError(subject, path, reason, "give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        reason = f"not a UTF-8 text file (byte 0x{content[error.start]:02X} in line {line})"
        raise ConfigError(subject, path, reason, "save it as UTF-8") from error
    return parse_yaml(text, subject, path)


def parse_yaml(text: str, subject: str, name: object) -> Any:
    """Read one YAML document, None if empty; `name`, a path or a preset, is the value of the setting `subject`."""
    try:
        root = yaml.compose(text, _Loader)
        if root is None:
            return None
        if _size(root, {}) > _MOST_VALUES:
            reason = f"stands for more than {_MOST_VALUES} values"
            raise ConfigError(subject, name, reason, "give a file of settings, without aliases of aliases")
        for repeated in _repeated(root):
            raise ConfigError(subject, name, repeated, "keep one of them")
        return _Loader("").construct_document(root)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # Besides its own, yaml lets through what its scalars raise: !!int x, 2020-99-99, !!bool x.
        raise ConfigError(subject, name, *_explained(error)) from error


def check_json(flag: str, text: str) -> None:
    """Raise a ConfigError for a JSON object with a duplicate key; other text is left to its reader."""

    def pairs(items: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in items]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(flag, text, f"{twice} is given twice", "keep one of them")
        return dict(items)

    try:
        json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError):
        return


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """The number of values that a node stands for, aliases written out: a few lines can stand for 10^20."""
    if id(node) not in sizes:
        sizes[id(node)] = 1  # meanwhile: of an anchor inside itself
        inside = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = (each if isinstance(each, tuple) else (each,) for each in inside)
        sizes[id(node)] = 1 + sum(_size(each, sizes) for pair in pairs for each in pair)
    return sizes[id(node)]


def _repeated(node: yaml.Node, path: str = "", seen: frozenset[int] = frozenset()) -> Iterator[str]:
    """A sentence for each duplicate key."""
    if id(node) in seen:
        return  # an anchor inside itself
    seen |= {id(node)}
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _repeated(item, f"{path}[{index}]", seen)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[tuple[str, str], list[int]] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                name = f"{path}.{key.value}" if path else key.value
                lines.setdefault((key.tag, name), []).append(key.start_mark.line + 1)
                yield from _repeated(value, name, seen)
        for (_, name), found in lines.items():
            if len(found) > 1:
                where = f"lines {', '.join(map(str, found[:-1]))} and {found[-1]}" if len(set(found)) > 1 else None
                times = "twice" if len(found) == 2 else f"{len(found)} times"
                yield f"{name} is given {times}, in {where or f'line {found[0]}'}"


def _explained(error: Exception) -> tuple[str, str]:
    mark = getattr(error, "problem_mark", None)
    problem = str(getattr(error, "problem", None) or error)
    if mark is None:
        return f"not valid YAML ({' '.join(problem.split())})", "correct the file"
    line = mark.line + 1
    if problem == "but found another document":
        return f"contains a second document from line {line} on", "keep one document per file"
    if r"'\t'" in problem:
        return f"not valid YAML (a tab in line {line})", "indent with spaces"
    return f"not valid YAML ({problem} in line {line}, column {mark.column + 1})", "correct the file"
