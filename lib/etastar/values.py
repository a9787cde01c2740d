"""Frozen values with a canonical JSON form and a stable hash: what recipes, schedules and optimizers are made of.

A value's JSON names its kind and the fields that differ from their defaults, so that a field added later with a
default changes no hash and orphans no store.
"""

import dataclasses
import functools
import hashlib
import json
import numbers
import types
import typing

_KINDS: dict[str, type] = {}


@typing.dataclass_transform(frozen_default=True)
def value(cls):
    """Turn a class into a frozen, registered dataclass whose fields are checked against their annotations.

    Ints are taken for float fields, numpy scalars for either; anything else of the wrong type raises TypeError that
    names the field, a string that is none of a Literal's choices ValueError that lists them. A `check(self)` method,
    own or inherited, runs after the types are known to be right. Two modules with a class of one name raise TypeError.
    """
    own_check = getattr(cls, "check", None)
    taken = _KINDS.get(cls.__name__)
    if taken is not None and taken.__module__ != cls.__module__:
        raise TypeError(f"{taken.__module__} has a value {cls.__name__}; give that of {cls.__module__} another name")

    def __post_init__(self):
        for name, hint in _hints(type(self)):
            object.__setattr__(self, name, _coerce(type(self).__name__, name, getattr(self, name), hint))
        if own_check is not None:
            own_check(self)

    cls.__post_init__ = __post_init__
    cls = dataclasses.dataclass(frozen=True)(cls)
    _KINDS[cls.__name__] = cls
    return cls


def encode(item):
    """JSON-ready form of a value: {"kind": name, field: ...} with default fields left out."""
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        body = {"kind": type(item).__name__}
        for name, is_default in _defaults(type(item)):
            given = getattr(item, name)
            if not is_default(given):
                body[name] = encode(given)
        return body
    if isinstance(item, tuple | list):
        return [encode(part) for part in item]
    return item


def decode(body):
    """The value that `encode` wrote; unknown kinds and unknown keys raise ValueError naming them."""
    if isinstance(body, list):
        return tuple(decode(part) for part in body)
    if not isinstance(body, dict):
        return body
    kind = body.get("kind")
    if kind not in _KINDS:
        raise ValueError(f"unknown kind {kind!r}; known kinds: {', '.join(sorted(_KINDS))}")
    cls = _KINDS[kind]
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(body) - known - {"kind"})
    if unknown:
        names = ", ".join(map(repr, unknown))
        raise ValueError(f"unknown key {names} for {kind}; it takes: {', '.join(sorted(known))}")
    return cls(**{name: decode(part) for name, part in body.items() if name != "kind"})


def canonical_json(item) -> str:
    """One line of JSON that is the same for equal values on every platform."""
    return json.dumps(encode(item), sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(*parts, length: int = 16) -> str:
    """Hex sha256 (first `length` digits) over the canonical JSON of the parts."""
    return digest_of_json(*map(canonical_json, parts), length=length)


def digest_of_json(*texts: str, length: int = 16) -> str:
    """`digest` of parts whose canonical JSON is there already."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:length]


def exactly_one(owner: str, **given) -> str:
    """The one name whose value is not None; ValueError names all of them otherwise."""
    named = [name for name, item in given.items() if item is not None]
    if len(named) != 1:
        got = ", ".join(f"{name}={item!r}" for name, item in given.items())
        raise ValueError(f"{owner}: give exactly one of {', '.join(given)}; got {got}")
    return named[0]


def at_most_one(owner: str, **given) -> None:
    """ValueError when more than one of the named values is not None."""
    named = [f"{name}={item!r}" for name, item in given.items() if item is not None]
    if len(named) > 1:
        raise ValueError(f"{owner}: give at most one of {', '.join(given)}; got {', '.join(named)}")


@functools.cache
def _hints(cls) -> tuple[tuple[str, typing.Any], ...]:
    """(field, its annotation), resolved once a class."""
    hints = typing.get_type_hints(cls)
    return tuple((field.name, hints[field.name]) for field in dataclasses.fields(cls))


@functools.cache
def _defaults(cls) -> tuple[tuple[str, typing.Callable], ...]:
    """(field, whether something is its default), made once a class: ids of large grids are asked for often."""
    return tuple((field.name, _is_default(field)) for field in dataclasses.fields(cls))


def _is_default(field):
    if field.default is not dataclasses.MISSING:
        return lambda given: type(given) is type(field.default) and given == field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
        return lambda given: given == default
    return lambda given: False


def _coerce(owner, name, given, hint):
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if hint is typing.Any:
        return given
    for option in options:
        ok, taken = _as(given, option)
        if ok:
            return taken
    message = f"{owner}.{name} must be {_spell(options)}; got {given!r} ({type(given).__name__})"
    chosen = isinstance(given, str) and any(typing.get_origin(option) is typing.Literal for option in options)
    raise ValueError(message) if chosen else TypeError(message)


def _as(given, option):
    if option is type(None):
        return given is None, None
    if isinstance(given, bool) or option is bool:
        return isinstance(given, bool) and option is bool, given
    if option is int:
        whole = isinstance(given, numbers.Integral) or (isinstance(given, float) and given.is_integer())
        return whole, int(given) if whole else given
    if option is float:
        real = isinstance(given, numbers.Real)
        return real, float(given) if real else given
    origin = typing.get_origin(option)
    if option is tuple or origin is tuple:
        return _as_tuple(given, typing.get_args(option))
    if origin is typing.Literal:
        return given in typing.get_args(option), given
    return isinstance(given, option), given


def _as_tuple(given, elements):
    """`elements` as tuple[…] has them: none for anything, one and an ellipsis for any number of it, or one a place."""
    if not isinstance(given, tuple | list):
        return False, given
    if not elements:
        return True, tuple(given)
    if elements[1:] == (...,):
        elements = elements[:1] * len(given)
    if len(elements) != len(given):
        return False, given
    parts = [_as(part, option) for part, option in zip(given, elements, strict=True)]
    return all(ok for ok, _ in parts), tuple(part for _, part in parts)


def _spell(options) -> str:
    names = []
    for option in options:
        if typing.get_origin(option) is typing.Literal:
            names += [repr(choice) for choice in typing.get_args(option)]
        else:
            plain = isinstance(option, type) and not typing.get_args(option)
            names.append("None" if option is type(None) else option.__name__ if plain else str(option))
    return " or ".join(names)
