"""What pydantic finds wrong, as sentences for whoever wrote the file: key, value, what is allowed. One error, one line.

A range is stated whole, both ends of it, and for a value of the wrong type too. Knows no particular model.
"""

from __future__ import annotations

import reprlib
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, Tag, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

MAX_SENTENCES = 20
"""A file that is wrong throughout is not repeated in full."""
SHOWN_CHARACTERS = 100

_BOUND_ERRORS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "multiple_of"}
_TYPE_ERRORS = {"finite_number", "float_parsing", "float_type", "int_from_float", "int_parsing", "int_type"}
_NO_NUMBER = "Input should be a valid number"
_BOUNDS = (
    (annotated_types.Gt, "gt", "greater than"),
    (annotated_types.Ge, "ge", "greater than or equal to"),
    (annotated_types.Lt, "lt", "less than"),
    (annotated_types.Le, "le", "less than or equal to"),
    (annotated_types.MultipleOf, "multiple_of", "a multiple of"),
)

_repr = reprlib.Repr()
# Bounded in depth and width: YAML aliases make a few lines into a value whose full text fills the memory.
_repr.maxlevel, _repr.maxstring, _repr.maxother, _repr.maxlong = 3, 80, 80, 40


@dataclass(frozen=True)
class Fault:
    """A wrong value that only a comparison finds. key: from where the validator stands, by dots; "" is that place."""

    key: str
    value: Any
    allowed: str

    def sentence(self, place: str = "") -> str:
        """The sentence. place: the key where the validator stands."""
        value = "" if isinstance(self.value, Mapping) else f" {shown(self.value)}"
        return f"{'.'.join(filter(None, (place, self.key)))}: the value{value} is not allowed: {self.allowed}."


def refuse(faults: Sequence[Fault]) -> NoReturn:
    """To be called by validators: each fault becomes a sentence of its own under its own key."""
    text = " ".join(fault.sentence() for fault in faults)
    raise PydanticCustomError("faults", "{text}", {"text": text, "faults": tuple(faults)})


def sentences(
    error: ValidationError, root: type[BaseModel], *, name: str, tags: Collection[str] = frozenset()
) -> list[str]:
    """One sentence per error, the first `MAX_SENTENCES` of them.

    root: the model that was validated; name: what it is called where the error has no key. tags: names of alternatives
    (`pydantic.Tag`), which are no part of a key.
    """
    lines: list[str] = []
    errors = error.errors(include_url=False)
    for item in errors[: MAX_SENTENCES + 1]:
        lines += _lines(item, root, name, tags)
    left_out = len(lines) - MAX_SENTENCES + max(0, len(errors) - MAX_SENTENCES - 1)
    return lines if left_out <= 0 else [*lines[:MAX_SENTENCES], f"{name}: {left_out} more errors like these."]


def shown(value: Any) -> str:
    """A value as it may be repeated to whoever wrote it: bounded, whatever it is."""
    try:
        return textwrap.shorten(_repr.repr(value), SHOWN_CHARACTERS, placeholder=" ...")
    except ValueError:
        # Python writes out no integer of more than 4,300 digits.
        return "of too many digits"


def one_line(part: int | str) -> str:
    """One part of a key as it may stand in a sentence."""
    text = str(part)
    return text if text.isprintable() and text and len(text) <= SHOWN_CHARACTERS else shown(text)


def _lines(item: ErrorDetails, root: type[BaseModel], name: str, tags: Collection[str]) -> list[str]:
    location, kind = item["loc"], item["type"]
    key = ".".join(one_line(part) for part in location if part not in tags) or name
    if kind == "faults":
        place = "" if key == name else key
        return [fault.sentence(place) for fault in item["ctx"]["faults"]]
    if kind == "extra_forbidden":
        return [f"{key}: unknown key; allowed here: {', '.join(_keys(root, location[:-1], tags))}."]
    allowed = _range(_find(root, location, tags)[1])
    if kind == "missing":
        needed = _needed(_find(root, location, tags))
        return [f"{key}: missing, and it has no default{needed}."]
    message = item["msg"].removeprefix("Value error, ").split(" or instance of ")[0]
    if kind in _BOUND_ERRORS and allowed:
        message = f"Input should be {allowed}"
    elif allowed and (kind in _TYPE_ERRORS or message == _NO_NUMBER):
        message = f"{message.split(',')[0]} {allowed}"
    return [Fault(key, item["input"], message).sentence()]


def _needed(place: tuple[Any, tuple[Any, ...]]) -> str:
    """What a missing key could be, where that is short."""
    annotation, metadata = place
    if get_origin(annotation) is Literal:
        return f"; allowed: {' or '.join(map(repr, get_args(annotation)))}"
    allowed = _range(metadata)
    return f"; allowed: {allowed}" if allowed else ""


def _range(metadata: Iterable[Any]) -> str:
    """ "greater than 0 and less than 1"; empty where there are no bounds."""
    found = [
        f"{words} {getattr(bound, attribute)}"
        for bound in metadata
        for kind, attribute, words in _BOUNDS
        if isinstance(bound, kind)
    ]
    return " and ".join(found)


def _keys(root: type[BaseModel], location: tuple[int | str, ...], tags: Collection[str]) -> list[str]:
    """The keys that are known in the place where an unknown one was found."""
    model = _find(root, location, tags)[0]
    return sorted(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _find(root: Any, location: tuple[int | str, ...], tags: Collection[str]) -> tuple[Any, tuple[Any, ...]]:
    """The type and the bounds of what stands at `location`; (None, ()) where nothing is known there."""
    annotation, metadata = _unwrap(root)
    for part in location:
        if part in tags:
            found = next((kind for kind in get_args(annotation) if _tagged(kind, str(part))), None)
            annotation, metadata = _unwrap(found)
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
            field = annotation.model_fields.get(str(part))
            if field is None:
                return None, ()
            annotation, metadata = _unwrap(field.annotation)
            metadata = (*_flat(field.metadata), *metadata)
        elif get_origin(annotation) in (dict, tuple, list):
            # Names and places in a list are free: what stands there is told by the type of the values.
            values = [kind for kind in get_args(annotation) if kind is not Ellipsis]
            annotation, metadata = _unwrap(values[-1])
        else:
            return None, ()
    return annotation, metadata


def _unwrap(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without `Annotated` and `| None`, and what they say of it."""
    metadata: tuple[Any, ...] = ()
    while True:
        origin = get_origin(annotation)
        if origin is Annotated:
            annotation, *more = get_args(annotation)
            metadata += _flat(more)
            continue
        present = [kind for kind in get_args(annotation) if kind is not NoneType]
        if origin not in (Union, UnionType) or len(present) != 1:
            return annotation, metadata
        annotation = present[0]


def _flat(metadata: Iterable[Any]) -> tuple[Any, ...]:
    """Metadata with that of `Field(...)` in its place."""
    return tuple(part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else (item,)))


def _tagged(kind: Any, tag: str) -> bool:
    return get_origin(kind) is Annotated and any(
        isinstance(item, Tag) and item.tag == tag for item in kind.__metadata__
    )
