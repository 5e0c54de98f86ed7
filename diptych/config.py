"""Frozen keyword-only dataclasses <-> YAML, with errors that name the file, the place and the nearest key.

    load(Recipe, "recipes/mini.yaml", ["seed=3", "stages.0.lr=1e-3"])   -> Recipe
    from_dict(Recipe, {...}, where="mini.yaml")                          -> Recipe
    to_dict(recipe)                                                      -> plain dicts, lists and scalars
    merge(config, {"trunk.layers": 6, "vision": {"width": 64}})          -> a changed copy of the same type

The dataclass is the schema: nested dataclasses, unions, tuple, list, dict, Literal, Path and scalars.
"""
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

T = TypeVar("T")


class ConfigError(ValueError):
    """A config that cannot be read; the message names the file and the dotted place."""


def load(cls: type[T], path: str | Path, overrides: Iterable[str] = ()) -> T:
    """Read a YAML file, apply dotted overrides (`stages.0.lr=1e-3`), check against `cls`."""
    data = read_yaml(path)
    return from_dict(cls, override(data, overrides, where=str(path)), where=str(path))


def save(config: Any, path: str | Path) -> None:
    """Write a config as YAML (to a temporary name, then renamed)."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))
    temporary.replace(path)


def read_yaml(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"expected a YAML file at {path}, got {'a folder' if path.is_dir() else 'nothing'}")
    try:
        data = yaml.load(path.read_text(), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: expected YAML; {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected keys and values, got {_kind(data)}")
    return data


def to_dict(config: Any) -> Any:
    """Plain dicts, lists and scalars; what `from_dict` reads back to an equal object."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}
    if isinstance(config, Mapping):
        return {k: to_dict(v) for k, v in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(v) for v in config]
    return str(config) if isinstance(config, Path) else config


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "config") -> T:
    """Build a dataclass from plain data. `where` (the file) starts every error message."""
    return _convert(cls, data, where, ())


def merge(config: T, changes: Mapping[str, Any], where: str = "config", parts: Mapping[str, Any] | None = None) -> T:
    """A copy of a config with some keys changed; keys may be nested or dotted. `parts` are replaced as a whole first:
    one may be of another of the types that its place allows."""
    data = to_dict(config)
    for place, part in (parts or {}).items():
        _set(data, place.split("."), to_dict(part), where)
    for path, value in _leaves(changes):
        _set(data, path, value, where)
    return from_dict(type(config), data, where)


def override(data: Mapping[str, Any], overrides: Iterable[str], where: str = "config") -> dict[str, Any]:
    """Apply `dotted.path=value` texts to plain data; the values are YAML (`null`, `[1, 2]`, `{a: 1}`)."""
    changed = _copy(dict(data))
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not path.strip():
            raise ConfigError(f"expected an override like stages.0.lr=1e-3, got {text!r}")
        try:
            parsed = yaml.load(value, Loader=_Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"expected YAML after '=' in the override {text!r}; {error}") from None
        _set(changed, path.strip().split("."), parsed, where)
    return changed


def unknown_key(key: str, known: Iterable[str], where: str) -> ConfigError:
    """The error for a key (or name) that does not exist, with the nearest one that does."""
    names = sorted(known)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f"; fix: did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"{where}: expected one of {', '.join(names) or '(no keys)'}, got unknown {key!r}{hint}")


# -- paths in plain data -----------------------------------------------------------------------------------------------

def _set(data: Any, path: Sequence[str], value: Any, where: str) -> None:
    for depth, key in enumerate(path):
        last = depth == len(path) - 1
        place = ".".join(path[: depth + 1])
        if isinstance(data, list):
            if not key.isdigit() or int(key) >= len(data):
                raise ConfigError(f"{where}: expected an index below {len(data)} at {place}, got {key!r}")
            slot: Any = int(key)
        elif isinstance(data, dict):
            slot = key
        else:
            raise ConfigError(f"{where}: expected keys below {'.'.join(path[:depth])}, got the value {data!r}")
        if last:
            data[slot] = value
            return
        inner = data[slot] if isinstance(data, list) else data.get(slot)
        if inner is None:
            inner = data[slot] = {}
        data = inner


def _leaves(changes: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], Any]]:
    for key, value in changes.items():
        here = (*path, *str(key).split("."))
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, here)
        else:
            yield here, value


def _copy(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {k: _copy(v) for k, v in data.items()}
    return [_copy(v) for v in data] if isinstance(data, (list, tuple)) else data


# -- types -------------------------------------------------------------------------------------------------------------

def _convert(kind: Any, value: Any, where: str, path: tuple[str, ...]) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return _copy(value)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _dataclass(kind, value, where, path)
    if origin is Literal:
        if not any(value == a and type(value) is type(a) for a in args):
            raise _error(f"one of {', '.join(map(str, args))}", value, where, path, near=[str(a) for a in args])
        return value
    if origin in (Union, types.UnionType):
        return _union(args, value, where, path)
    if origin is typing.Annotated:
        return _convert(args[0], value, where, path)
    base = origin or kind
    if base in (tuple, list, Sequence):
        return _sequence(base, args, value, where, path)
    if base in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise _error("keys and values", value, where, path)
        key_kind, value_kind = args or (Any, Any)
        return {_convert(key_kind, k, where, (*path, str(k))): _convert(value_kind, v, where, (*path, str(k)))
                for k, v in value.items()}
    return _scalar(kind, value, where, path)


def _dataclass(cls: Any, value: Any, where: str, path: tuple[str, ...]) -> Any:
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise _error(f"the keys of {cls.__name__}", value, where, path)
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    place = _place(where, path)
    for key in value:
        if key not in fields:
            raise unknown_key(str(key), fields, place)
    missing = [n for n, f in fields.items() if n not in value
               and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    if missing:
        raise ConfigError(f"{place}: expected {', '.join(missing)}, got {', '.join(map(str, value)) or 'nothing'}")
    converted = {k: _convert(hints[k], v, where, (*path, k)) for k, v in value.items()}
    try:
        return cls(**converted)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:  # a check in __post_init__: add where it happened
        raise ConfigError(f"{place}: {error}") from error


def _union(args: tuple[Any, ...], value: Any, where: str, path: tuple[str, ...]) -> Any:
    if value is None and type(None) in args:
        return None
    choices = [a for a in args if a is not type(None)]
    # an exact type wins, so that `str | float` keeps "1e-4" and `int | float` keeps 1
    for choice in choices:
        if isinstance(choice, type) and type(value) is choice:
            return value
    errors: list[ConfigError] = []
    for choice in choices:
        try:
            return _convert(choice, value, where, path)
        except ConfigError as error:
            errors.append(error)
    # the longest message names the deepest place: the choice that fitted best
    raise max(errors, key=lambda e: len(str(e)))


def _sequence(base: Any, args: tuple[Any, ...], value: Any, where: str, path: tuple[str, ...]) -> Any:
    if not isinstance(value, (list, tuple)):
        raise _error("a list", value, where, path)
    if base is tuple and args and not (len(args) == 2 and args[1] is Ellipsis):
        if len(value) != len(args):
            raise _error(f"a list of {len(args)}", value, where, path)
        kinds = list(args)
    else:
        kinds = [args[0] if args else Any] * len(value)
    items = [_convert(k, v, where, (*path, str(i))) for i, (k, v) in enumerate(zip(kinds, value, strict=True))]
    return items if base is list else tuple(items)


def _scalar(kind: Any, value: Any, where: str, path: tuple[str, ...]) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise _error("true or false", value, where, path)
    if kind is int:
        number = _number(value)
        if number is not None and number == int(number):
            return int(value) if isinstance(value, int) else int(number)
        raise _error("an integer", value, where, path)
    if kind is float:
        number = _number(value)
        if number is not None:
            return number
        raise _error("a number", value, where, path)
    if kind is str:
        if isinstance(value, str):
            return value
        raise _error("a text", value, where, path)
    if kind is Path and isinstance(value, (str, Path)):
        return Path(value)
    if kind in (None, type(None)):
        if value is None:
            return None
        raise _error("null", value, where, path)
    if isinstance(kind, type) and isinstance(value, kind):
        return value
    raise _error(getattr(kind, "__name__", str(kind)), value, where, path)


def _number(value: Any) -> float | None:
    """YAML 1.1 reads `1e-4` as text; take any finite number however it was written. None if it is not one."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if number - number == 0 else None


def _error(expected: str, value: Any, where: str, path: tuple[str, ...], near: Sequence[str] = ()) -> ConfigError:
    match = difflib.get_close_matches(str(value), near, n=1, cutoff=0.5)
    hint = f"; fix: did you mean {match[0]!r}?" if match else ""
    return ConfigError(f"{_place(where, path)}: expected {expected}, got {_kind(value)}{hint}")


def _place(where: str, path: tuple[str, ...]) -> str:
    return f"{where}: {'.'.join(path)}" if path else where


def _kind(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{type(value).__name__} {text[:57]}..."


class _Loader(yaml.SafeLoader):
    """Refuses a key given twice, which PyYAML would silently resolve to the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int, float, bool)) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key) if isinstance(key, (str, int, float, bool)) else None
        return super().construct_mapping(node, deep)


def unknown(expected: str, got: str, names: Iterable[str]) -> ValueError:
    """The error for a name that does not exist, with the nearest that does."""
    names = list(names)
    near = difflib.get_close_matches(Path(got).stem, names, n=1, cutoff=0.5)
    hint = f"; fix: did you mean {near[0]!r}?" if near else ""
    return ValueError(f"expected {expected} ({', '.join(names) or 'none is bundled'}), got {got!r}{hint}")
