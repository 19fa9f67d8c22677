"""JSON schemas as llguidance takes them: limited in size, and without what it would refuse or take too widely.

Keywords are those of JSON Schema 2020-12 (https://json-schema.org/draft/2020-12).
"""

import json
import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from typing import Any, Final
from urllib.parse import quote, unquote

from edge_phi3.engine.errors import SchemaError

_MOST_OPTIONAL: Final = 128
"""Properties of an object that are not required: each may be the next one."""
_MOST_MERGED: Final = 2000
"""Schemas that come of a schema when what is merged (``allOf``, and what stands beside ``$ref``) is written out."""
_MOST_PATTERNS: Final = 12
"""Patterns that a text may be to match; whether any text does is found out in time that doubles with each."""
_MOST_EXCLUSIVE: Final = 200
"""Schemas of a ``oneOf`` that are compared with each other."""
_LARGEST_MULTIPLE: Final = 9999
"""Of ``multipleOf`` in units of its last digit, and of several that are merged: as many states keep remainders."""
_MOST_FOLLOWED: Final = 100
"""References that lead to references."""
_LARGEST: Final = 10**15
"""What constants, numbers with a bound, and multiples are limited to: their digits end, and llguidance, which reckons
integers in 64 bits and ends the process beyond, is far from there."""
_NEAR, _NEAR_SHARE = 1e-9, 1e-14
"""How far from exclusive bounds of numbers, at whole numbers, the inclusive ones are that they become, at least."""

_OPTIONS: Final = {"whitespace_pattern": r"\n {0,16}| {1,16}"}
"""White space, which comes at most once in each place."""
_ESCAPES: Final = {"json_allow_general_unicode_escapes": True}
_NO_ESCAPES: Final = {"json_allowed_escapes": 'nrbtf\\"'}
"""Without ``\\u``, by which a further property could have the name of one that there is."""

_OLDER_DRAFTS: Final = tuple(f"http://json-schema.org/draft-0{number}/schema#" for number in (4, 6, 7))
_UNREAD: Final = frozenset({"x-guidance", "$id", "id"})
_EMPTY: Final = (("uniqueItems", False), ("propertyNames", {"type": "string"}))
_NEVER: Final[dict[str, Any]] = {"not": {}}

_MAPS: Final = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_COMBINING: Final = frozenset({"$ref", "anyOf", "oneOf", "allOf"})
_SCHEMAS: Final = _COMBINING - {"$ref"} | {"items", "prefixItems", "additionalItems", "additionalProperties"}
_PATTERNED: Final = frozenset({"pattern", "format"})
_ABOUT_MEMBERS: Final = frozenset(
    {"properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties"}
)

_DATE: Final = (
    r"(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    r"|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_TIME: Final = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_PATTERNS: Final = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}
"""Formats of which llguidance writes more than Python reads: 29 February of any year, the year 0, leap seconds."""
_FORMATS: Final = frozenset({*_PATTERNS, "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"})
"""Those that llguidance knows; by the standard the others are annotations."""


@dataclass(frozen=True, slots=True)
class SchemaLimits:
    """How much a request may ask for: `depth` objects and lists inside each other.

    `size` counts the characters of all names and texts of its schemas and rules, and four for each other value.
    """

    size: int = 64 << 10
    depth: int = 100

    def check(self, *values: object) -> None:
        """Raise `SchemaError` where schemas or rules are beyond the limits; large ones are not looked through."""
        left, level = self.size, list(values)
        for _ in range(self.depth + 2):
            inside: list[object] = []
            for value in level:
                left -= len(value) + 2 if isinstance(value, str) else 4
                if isinstance(value, dict):
                    left -= sum(map(len, value))
                    inside += value.values()
                elif isinstance(value, list):
                    inside += value
                if left < 0:
                    raise SchemaError(f"it has more than {self.size} characters (--max-schema-size)")
                if isinstance(value, float) and not math.isfinite(value):
                    raise SchemaError("it holds a number that is not finite")
            if not inside:
                return
            level = inside
        raise SchemaError(
            f"objects and arrays inside each other are taken up to {self.depth} deep (--max-schema-depth)"
        )


DEFAULT_LIMITS: Final = SchemaLimits()


def adapted(schema: object) -> dict[str, Any]:
    """Return an equal or narrower schema for llguidance, with options for it; or `SchemaError`.

    - ``oneOf`` whose schemas exclude each other becomes ``anyOf``, also where they are references.
    - Dates and times become patterns, and formats that are unknown, such as ``int32``, are passed over.
    - Of equal schemas of an ``anyOf`` the first alone counts.
    - An object that names its properties takes no others unless it says so, or is put together from several schemas.
    - Bounds of numbers lie within 10^15, and multiples have some.
    """
    if schema is True:
        schema = {}
    if not isinstance(schema, dict) or schema == _NEVER:
        raise SchemaError("it accepts nothing" if schema in (False, _NEVER) else "a schema must be an object")
    adapter = _Adapter(schema)
    result: dict[str, Any] = adapter.adapt(schema)
    if adapter.merges and adapter.merged(schema) > _MOST_MERGED:
        raise SchemaError(f"`allOf` and what stands beside `$ref` merge more than {_MOST_MERGED} schemas")
    if adapter.merges and math.lcm(*(unit.numerator for unit in adapter.multiples)) > _LARGEST_MULTIPLE:
        raise SchemaError("the common multiple of several `multipleOf` has more than four digits")
    if adapter.meets and max(len(each | adapter.texts[""]) for each in adapter.texts.values()) > _MOST_PATTERNS:
        raise SchemaError(f"`allOf` and what stands beside `$ref` merge more than {_MOST_PATTERNS} patterns or formats")
    if any(map(_overflows, [adapter.multiples] if adapter.merges else [{unit} for unit in adapter.multiples])):
        raise SchemaError("`multipleOf` has too many decimal places, or several have for each other")
    if not adapter.merges:
        for each in adapter.closable:
            each["additionalProperties"] = False
    closed = all(each.get("additionalProperties") is False for each in adapter.named)
    return result | {"x-guidance": _OPTIONS | (_ESCAPES if closed else _NO_ESCAPES)}


def _is_exact(value: object) -> bool:
    """Return whether llguidance reads a constant's numbers as they are: those of up to 15 digits it does."""
    if isinstance(value, dict | list):
        return all(map(_is_exact, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, int | float) or (abs(value) <= _LARGEST and float(f"{value:.15g}") == value)


def _overflows(multiples: set[Fraction]) -> bool:
    """Return whether numbers, and 1, counted in units of the last decimal place of all, are too much for llguidance."""
    units = (10**places for places in range(16) if all((10**places * each).denominator == 1 for each in multiples))
    unit = next(units, None)
    return unit is None or bool(math.prod(int(each * unit) for each in multiples) * unit >= 1 << 32)


def _parts(schema: dict[str, Any]) -> int:
    return len(_COMBINING & schema.keys()) + bool(_ABOUT_MEMBERS & schema.keys())


def _marks(schema: object) -> dict[str, set[str]]:
    """Return, for the type ("") and each required property with constants, the values that it may have."""
    if not isinstance(schema, dict):
        return {}
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else []
    # An integer is a number too.
    marks = {"": {"number" if kind == "integer" else str(kind) for kind in kinds}} if kinds else {}
    properties, required = schema.get("properties"), schema.get("required")
    if marks.get("") == {"object"} and isinstance(properties, dict) and isinstance(required, list):
        for name in {name for name in required if isinstance(name, str)}:
            each = properties.get(name)
            if isinstance(each, dict) and ("const" in each or isinstance(each.get("enum"), list)):
                values = [each["const"]] if "const" in each else each["enum"]
                marks[f"/{name}"] = {_mark(value) for value in values}
    return marks


def _mark(value: object) -> str:
    """Write a value so that equal ones, 1 and 1.0 among them, are written alike."""
    return json.dumps(json.loads(json.dumps(value), parse_int=float), sort_keys=True)


def _bound(schema: dict[str, Any]) -> None:
    """Bring the bounds of a number within what llguidance reckons with, in place.

    Where both have the same integer part, it takes an exclusive one that is nearer to 0 than the other for inclusive.
    """
    for name, sign in (("minimum", -1), ("exclusiveMinimum", -1), ("maximum", 1), ("exclusiveMaximum", 1)):
        side = "minimum" if sign < 0 else "maximum"
        value = schema.get(side if schema.get(name) is True else name)  # true is draft 4's
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if value * sign < -_LARGEST:
            raise SchemaError(f"`{name}` lies beyond 10^15")
        if abs(value) > _LARGEST:
            bound: float = sign * _LARGEST
        elif name != side and schema.get("type") != "integer" and value * sign <= 0 and value == int(value):
            bound = value - sign * max(_NEAR, abs(value) * _NEAR_SHARE)
        else:
            continue
        del schema[name]
        other = schema.get(side)
        schema[side] = other if isinstance(other, int | float) and other * sign < bound * sign else bound


class _Adapter:
    """Changes a schema and those inside it.

    `merges` is whether any object is put together from several schemas; `named` are the changed objects that name
    properties, `closable` those of them that say nothing of others; `multiples` is what numbers are multiples of.
    `texts` are the patterns and formats of each property, or none (""), `meets` is whether a text may need several.
    """

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self.merges = False
        self.multiples: set[Fraction] = set()
        self.texts: dict[str, set[str]] = {"": set()}
        self.meets = False
        self.named: list[dict[str, Any]] = []
        self.closable: list[dict[str, Any]] = []
        self._sizes: dict[str, int] = {}
        self._following: list[str] = []

    def adapt(self, schema: Any, of: str = "") -> Any:
        """Return a changed copy of a schema, or of a list of schemas, for the property `of`."""
        if isinstance(schema, list):
            return [self.adapt(each, of) for each in schema]
        if not isinstance(schema, dict):
            return schema
        if schema == _NEVER:
            return False
        self._resolved(schema)
        exclusive = "anyOf" not in schema and self._excludes(schema)
        changed: dict[str, Any] = {}
        for name, value in schema.items():
            if name in {"const", "enum"} and not _is_exact(value):
                raise SchemaError(f"`{name}` holds a number of more than 15 digits")
            if name == "anyOf" and isinstance(value, list):
                first = {*{_mark(each): place for place, each in reversed([*enumerate(value)])}.values()}
                changed[name] = [self.adapt(each, of) if place in first else False for place, each in enumerate(value)]
            elif name in _SCHEMAS:
                same = of if name in _COMBINING else ""
                changed["anyOf" if name == "oneOf" and exclusive else name] = self.adapt(value, same)
            elif name in _MAPS and isinstance(value, dict):
                changed[name] = {key: self.adapt(each, key * (name == "properties")) for key, each in value.items()}
            elif name == "$ref" and isinstance(value, str):
                changed[name] = quote(unquote(value), "/#$~", errors="surrogatepass")
            elif name not in _UNREAD and (name != "$schema" or value in _OLDER_DRAFTS) and (name, value) not in _EMPTY:
                changed[name] = value
        if (kind := str(schema.get("format"))) in _PATTERNS and "pattern" not in schema:
            del changed["format"]
            changed["pattern"] = _PATTERNS[kind]
        elif kind not in _FORMATS:
            changed.pop("format", None)
        if "multipleOf" in schema:
            multiple = schema["multipleOf"]
            if isinstance(multiple, int | float) and not isinstance(multiple, bool) and multiple > 0:
                unit = Fraction(str(multiple))
                if unit.numerator > _LARGEST_MULTIPLE or unit.denominator > _LARGEST:
                    raise SchemaError("`multipleOf` has more than four digits, or more than 15 decimal places")
                self.multiples.add(unit)
            changed = {"minimum": -_LARGEST, "maximum": _LARGEST} | changed
        _bound(changed)
        self.texts.setdefault(of, set()).update(str(changed[name]) for name in _PATTERNED & changed.keys())
        self._note(schema, changed)
        return changed

    def _note(self, schema: dict[str, Any], changed: dict[str, Any]) -> None:
        all_of = schema.get("allOf")
        # llguidance compares what is left of `oneOf`, and must see objects as they are.
        self.merges |= _parts(schema) > 1 or (isinstance(all_of, list) and len(all_of) > 1) or "oneOf" in changed
        self.meets |= self.merges or bool(_COMBINING & schema.keys() and _PATTERNED & schema.keys())
        if schema.get("properties") or schema.get("patternProperties") or schema.get("minProperties"):
            self.named.append(changed)
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, dict) or not isinstance(required, list):
            return
        needed = set(map(str, required))
        if isinstance(least := schema.get("minProperties"), int) and least > len(needed) + 1:
            # The names of others may be the same.
            raise SchemaError("`minProperties` is supported up to one more than there are `required` properties")
        if len(properties.keys() - needed) > _MOST_OPTIONAL:
            raise SchemaError(f"an object has more than {_MOST_OPTIONAL} `properties` that are not `required`")
        if properties and _ABOUT_MEMBERS & schema.keys() <= {"properties", "required"} and needed <= properties.keys():
            self.closable.append(changed)

    def merged(self, schema: Any, beside: bool = False) -> int:
        """Return how many schemas come of one, or of a list, merged with another or not, when all is written out."""
        if isinstance(schema, list):
            return sum(self.merged(each, beside) for each in schema)
        if not isinstance(schema, dict):
            return 1
        beside = beside or _parts(schema) > 1
        count = 1
        for name, value in schema.items():
            if name in _SCHEMAS:
                several = name == "allOf" and isinstance(value, list) and len(value) > 1
                count += self.merged(value, several or (beside and name in _COMBINING))
            elif name in _MAPS and isinstance(value, dict):
                count += sum(map(self.merged, value.values()))
            elif name == "$ref" and beside and isinstance(value, str):
                count += self._merged_target(value)
        return count

    def _merged_target(self, pointer: str) -> int:
        if pointer not in self._sizes:
            if len(self._following) == _MOST_FOLLOWED:
                return _MOST_MERGED + 1
            self._sizes[pointer] = 0
            self._following.append(pointer)
            self._sizes[pointer] = self.merged(self._resolved({"$ref": pointer}), beside=True)
            self._following.pop()
        return self._sizes[pointer]

    def _excludes(self, schema: dict[str, Any]) -> bool:
        """Return whether ``oneOf`` means ``anyOf``: its schemas differ in type, or a required property's constant."""
        one_of = schema.get("oneOf")
        if not isinstance(one_of, list):
            return False
        own = {"type": schema["type"]} if "type" in schema else {}
        schemas = [self._resolved(each) for each in one_of]
        if len(schemas) > _MOST_EXCLUSIVE or len(set(map(id, schemas))) < len(schemas):
            return False
        pairs = combinations([_marks(own | each if isinstance(each, dict) else each) for each in schemas], 2)
        return all(any(not one[mark] & other[mark] for mark in one.keys() & other.keys()) for one, other in pairs)

    def _resolved(self, schema: object) -> object:
        """Follow a reference, and references to references."""
        seen: set[str] = set()
        while isinstance(schema, dict) and isinstance(pointer := schema.get("$ref"), str):
            if pointer in seen or len(seen) == _MOST_FOLLOWED:
                raise SchemaError(
                    f"`$ref` to {pointer[:80]!r} leads to itself, or through more than {_MOST_FOLLOWED} others"
                )
            seen.add(pointer)
            schema = self._target(pointer)
        return schema

    def _target(self, pointer: str) -> object:
        """Return what a reference leads to, which is a schema that `adapt` has seen, or will."""
        first, slash, rest = pointer.partition("/")
        found: Any = self._root if first == "#" else None
        keys = iter([part.replace("~1", "/").replace("~0", "~") for part in unquote(rest).split("/")] if slash else [])
        for part in keys:
            found = found.get(part) if isinstance(found, dict) and part in _MAPS | _SCHEMAS else None
            if isinstance(found, list):
                key = next(keys, "")
                place = int(key) if len(key) < 6 and key.isdecimal() else len(found)
                found = found[place] if place < len(found) else None
            elif part in _MAPS:
                found = found.get(next(keys, "")) if isinstance(found, dict) else None
        if not isinstance(found, dict | bool):
            raise SchemaError(f"`$ref` to {pointer[:80]!r} leads to no schema in `$defs`, `properties` or the like")
        return found
