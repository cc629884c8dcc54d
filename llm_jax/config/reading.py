"""Config files and overrides, read strictly: an unknown key at any depth, or a value of the wrong type, is told with the nearest name."""

import contextlib
import dataclasses
import difflib
import io
import json
import re
import traceback
import types
import typing
from typing import Any, TypeVar

from llm_jax.config import records
from llm_jax.config.records import Run, to_dict
from llm_jax.errors import ConfigError, UserError, suggest
from llm_jax.storage import Path, as_path

T = TypeVar("T")


def load(path: str | Path) -> Run:
    """The `Run` that the config file's `get_config()` returns.

    Raises:
        ConfigError: no such file, no `get_config` in it, an error in it, or a value that is not allowed.
    """
    return load_record(path, "get_config", Run)


def load_record(path: str | Path, function: str, kind: type[T]) -> T:
    """The record that a function of a Python file returns, with the types that its annotations say. Raises as `load`."""
    path = as_path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=1)
        raise ConfigError(f"no config file {path}" + (f"; did you mean {path.with_name(near[0])}?" if near else ""))
    if path.suffix != ".py":
        raise ConfigError(f"{path} is not a Python file")
    name = str(path.absolute())
    module = types.ModuleType(f"_config_{path.stem}")
    module.__file__ = name
    try:
        exec(compile(path.read_bytes(), name, "exec"), vars(module))
        if not hasattr(module, function):
            raise ConfigError(f"{path} has no function {function}()")
        record = getattr(module, function)()
    except UserError:
        raise
    except Exception as e:
        lines = [f":{frame.lineno}" for frame in traceback.extract_tb(e.__traceback__) if frame.filename == name]
        said = _with_suggestion(str(e), vars(module))
        raise ConfigError(f"{path}{''.join(lines[-1:])}: {type(e).__name__}: {said}") from e
    if not isinstance(record, kind):
        home = "llm_jax.config" if kind is Run else kind.__module__
        raise ConfigError(f"{path}: {function}() returned a {type(record).__name__}, not a {home}.{kind.__name__}")
    _check_types(record, str(path), function.removeprefix("get_"))
    return record


def _with_suggestion(message: str, names: dict[str, Any]) -> str:
    """The message; where it is Python's for a record made with an unknown field, with the nearest one."""
    found = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", message)
    kind = {**vars(records), **names}.get(found[1]) if found else None
    if not found or not dataclasses.is_dataclass(kind):
        return message
    return found[0] + suggest(found[2], [f.name for f in dataclasses.fields(kind)])  # newer Pythons suggest one too


_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", type(None): "None"}


def _describe(annotation: Any) -> str:
    """What a field of this type may hold, in words."""
    options = typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple:
        if options[1:] == (...,):
            return f"a tuple (separated by spaces on the command line), each value {_describe(options[0])}"
        return " and ".join(map(_describe, options))
    return (
        " or ".join(map(_describe, options))
        if options
        else _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))
    )


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of an annotated type; a whole number may stand for a number."""
    origin, options = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return True
    if origin is tuple:
        expected = options[:1] * len(value) if options[1:] == (...,) and isinstance(value, tuple) else options
        return isinstance(value, tuple) and len(value) == len(expected) and all(map(_fits, value, expected))
    if options:
        return any(_fits(value, option) for option in options)
    if annotation in (int, float):
        return isinstance(value, (int, annotation)) and not isinstance(value, bool)
    return isinstance(value, annotation)


def _check_types(record: Any, path: str, where: str = "config") -> None:
    """Raise unless each field of a record and of the records in it holds what its annotation says."""
    for name, annotation in typing.get_type_hints(type(record)).items():
        value = getattr(record, name)
        if not _fits(value, annotation):
            raise ConfigError(f"{path}: {where}.{name} is {value!r}: it must be {_describe(annotation)}")
        if dataclasses.is_dataclass(value):
            _check_types(value, path, f"{where}.{name}")


def _record_type(annotation: Any, value: Any) -> type | None:
    """The dataclass that a field holds, from its value or, where that is None, from its annotation."""
    if dataclasses.is_dataclass(value):
        return type(value)
    for option in (annotation, *typing.get_args(annotation)):
        if isinstance(option, type) and dataclasses.is_dataclass(option):
            return option
    return None


def _check_key(run: Any, key: str) -> tuple[Any, Any]:
    """(`run` with the optional records on the way to `key` filled in, what `key` may hold); raises unless it names a field at each depth."""
    names = key.replace("-", "_").split(".")
    whole = ".".join(("config", *names))

    def walk(record: Any, depth: int) -> tuple[Any, Any]:
        hints = typing.get_type_hints(type(record))
        name, where = names[depth], ".".join(("config", *names[:depth]))
        if name not in hints:
            raise ConfigError(f"unknown key {whole!r}: {where} has no {name!r}{suggest(name, hints)}")
        value = getattr(record, name)
        kind = _record_type(hints[name], value)
        if depth + 1 == len(names):
            if kind is not None:
                raise ConfigError(
                    f"{whole} is a record: set one of its parts, e.g. --{whole}.{dataclasses.fields(kind)[0].name}=..."
                )
            if Any in (hints[name], *typing.get_args(hints[name])):
                raise ConfigError(f"{whole} cannot be given on the command line: set it in the config file")
            return record, hints[name]
        if kind is None:
            missing = f"is None: set {where}.{name} in the config file" if hints[name] is Any else "has no parts"
            raise ConfigError(f"unknown key {whole!r}: {where}.{name} {missing}")
        filled, annotation = walk(kind() if value is None else value, depth + 1)
        return dataclasses.replace(record, **{name: filled}), annotation

    return walk(run, 0)


def _typed(run: Run, arguments: list[str]) -> Run | None:
    """`run` with the values of checked keys, or None if one has the wrong type."""
    import tyro

    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return tyro.cli(
                type(run), default=run, args=arguments, config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)
            )
    except SystemExit:
        return None


def _fits_alone(run: Run, group: list[str]) -> bool:
    """Whether one key's values have its type, be they allowed only together with those of other keys."""
    try:
        return _typed(run, group) is not None
    except ConfigError:
        return True


def override(run: Run, arguments: typing.Sequence[str]) -> Run:
    """`run` with `--config.KEY=VALUE` (or `--config.KEY VALUE ...`) applied, keys and types checked.

    Raises:
        ConfigError: an unknown key at any depth, with the nearest name, or a value of the wrong type.
    """
    groups: list[list[str]] = []
    annotations = []
    for argument in arguments:
        if argument.startswith("--"):
            if not argument.startswith("--config."):
                raise ConfigError(
                    f"unknown option {argument.split('=')[0]!r}: overrides are written --config.KEY=VALUE"
                )
            groups.append(["--" + argument.removeprefix("--config.")])
            run, annotation = _check_key(run, groups[-1][0][2:].split("=")[0])
            annotations.append(annotation)
        elif groups:
            groups[-1].append(argument)
        else:
            raise ConfigError(f"unexpected argument {argument!r}: overrides are written --config.KEY=VALUE")
    changed = _typed(run, [word for group in groups for word in group])
    if changed is not None:
        return changed
    wrong = [(group, annotation) for group, annotation in zip(groups, annotations) if not _fits_alone(run, group)]
    group, annotation = wrong[0] if wrong else (groups[-1], annotations[-1])
    key, _, value = group[0][2:].partition("=")
    given = " ".join(filter(None, [value, *group[1:]]))
    raise ConfigError(f"bad value: config.{key.replace('-', '_')} is {given!r}: it must be {_describe(annotation)}")


def parse(arguments: typing.Sequence[str]) -> Run:
    """The run that a command line `--config=FILE [--config.KEY=VALUE ...]` describes."""
    rest = list(arguments)
    for i, argument in enumerate(rest):
        if argument == "--config":
            if i + 1 == len(rest):
                raise ConfigError("--config names no file: say --config=configs/NAME.py")
            return override(load(rest[i + 1]), rest[:i] + rest[i + 2 :])
        if argument.startswith("--config="):
            return override(load(argument.removeprefix("--config=")), rest[:i] + rest[i + 1 :])
    raise ConfigError("no config: say --config=configs/NAME.py")


def show(run: Run) -> str:
    """The resolved config as text, a key a line."""
    lines: list[str] = []

    def walk(prefix: str, value: Any):
        if isinstance(value, dict):
            for name, part in value.items():
                walk(f"{prefix}.{name}" if prefix else name, part)
        else:
            lines.append(f"{prefix} = {json.dumps(value)}")

    walk("", to_dict(run))
    return "\n".join(lines)
