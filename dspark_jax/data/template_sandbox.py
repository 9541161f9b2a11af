"""The environment that chat templates run in: jinja's sandbox, with bounds on what one of them can make.

A deadline stops loops, and nothing stops a single operation: `'a' * 10**10` is one call into C that takes all memory
before it returns. So operations that can make much of little (products, sums, formats, joins, paddings) are weighed
before they run. The weight of a value is its characters, and `ITEM` for each item of a list or object, those of nested
values counted wherever they stand.
"""

import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import lru_cache, update_wrapper, wraps
from types import GeneratorType
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST = 50_000_000
"""Weight that one operation may make, far above any context."""
MOST_IN_ALL = 500_000_000
"""Weight that all operations of a rendering may make: values that are kept in lists add up."""

ITEM = 50
MOST_BITS = 1 << 16
"""The longest whole number: products and quotients of longer ones take minutes in one call into C."""

PADDING = {"center", "ljust", "rjust", "zfill", "batch", "slice"}
MULTIPLYING = {"indent", "expandtabs", "tojson", "translate", "wordwrap"}
"""Filters and methods of text whose result is as long as a number says, or as a product of their arguments."""


class TooMuch(Exception):
    """A template that would make more than the bounds allow."""


# The weight made so far. A rendering has a thread of its own.
_made = threading.local()


@lru_cache(maxsize=32)
def compiled(source: str) -> Template:
    """A chat template; jinja's errors for one that is damaged."""
    return _environment().from_string(source)


def rendered(source: str, variables: Mapping[str, Any]) -> str:
    """The template's text.

    Args:
        source: of the template.
        variables: its messages, special tokens and switches.

    Raises:
        TooMuch: it would make more than `MOST` or `MOST_IN_ALL`.
        Exception: whatever the template's own expressions raise.
    """
    _made.weight = 0
    return compiled(source).render(**variables)


def _allow(weight: int) -> None:
    _made.weight = getattr(_made, "weight", 0) + weight
    if weight > MOST:
        raise TooMuch(f"one operation would make more than {MOST:,} characters")
    if _made.weight > MOST_IN_ALL:
        raise TooMuch(f"its operations made more than {MOST_IN_ALL:,} characters")


def _weight(*values: Any) -> int:
    """The weight of values; counting ends soon after `MOST`, so that the count is bounded as well."""
    total, open_values = 0, list(values)
    while open_values and total <= MOST:
        value = open_values.pop()
        if isinstance(value, str | bytes):
            total += len(value)
        elif isinstance(value, int):
            # About its decimal digits: a power can make a number too long to print.
            total += value.bit_length() // 3
        elif isinstance(value, Mapping):
            total += ITEM * len(value)
            open_values += [*value, *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            total += ITEM * len(value)
            open_values += value
    return total


def _largest(*values: Any) -> int:
    """The largest whole number among arguments, 0 without one."""
    return max((abs(value) for value in values if isinstance(value, int)), default=0)


def _weight_of_format(text: str, values: list[Any]) -> int:
    """The most that a format can make: each of its fields as wide as the largest width, or all its values."""
    # An upper bound, not the exact length: a template is refused only far above any use.
    fields = text.count("%") + text.count("{")
    widths = [int(digits[:12]) for digits in re.findall(r"\d+", text)]
    return len(text) + fields * (max(widths, default=0) + _largest(*values) + _weight(*values))


def _weight_of_call(name: str, values: list[Any]) -> int:
    """The most that a filter or a method of text makes of its values, the first of which it is applied to."""
    weight, texts = _weight(*values), [value for value in values if isinstance(value, str)]
    if name in ("format", "strftime_now") and texts:
        return _weight_of_format(texts[0], values[1:])
    if name == "replace" and len(texts) > 2:
        # Each occurrence is replaced, and one letter may become a page.
        return weight + texts[0].count(texts[1]) * len(texts[2])
    if name == "join":
        # The separator stands between all items, so its length counts once for each.
        items = max((len(value) for value in values if isinstance(value, list | tuple | str)), default=0)
        return weight + items * max(map(len, texts), default=0)
    if name in PADDING:
        return weight + _largest(*values[1:])
    if name in MULTIPLYING:
        return weight * (1 + _largest(*values[1:]) + _weight(*values[1:]))
    return weight


def _allow_bits(operator: str, left: int, right: int) -> None:
    """TooMuch where two whole numbers, or what an operator makes of them, are longer than `MOST_BITS`."""
    ours, theirs = left.bit_length(), right.bit_length()
    # A product has the bits of both; a power as many times its base's as its exponent says.
    made = max(ours, theirs)
    if operator == "*":
        made = ours + theirs
    elif operator == "**":
        made = max(made, ours * abs(right))
    if made > MOST_BITS:
        raise TooMuch(f"one operation would work on numbers of more than {MOST_BITS:,} bits")


def _listed(value: Any) -> Any:
    """A generator's items, weighed as they come; any other value as it is."""
    if not isinstance(value, GeneratorType):
        return value

    items = []
    for item in value:
        # While it is filled: a generator may have no end, and its list would be weighed too late.
        _allow(_weight(item))
        items.append(item)
    return items


def _weighed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)  # keeps jinja's mark of filters that take the context first
    def bounded(*args: Any, **kwargs: Any) -> Any:
        # A generator has no length until it has run; run here, its items are weighed one by one.
        given = [_listed(arg) for arg in args]
        shown = given[1:] if hasattr(call, "jinja_pass_arg") else given
        _allow(_weight_of_call(name, [*shown, *kwargs.values()]))
        return call(*given, **kwargs)

    return bounded


class _Generator(CodeGenerator):
    """Code whose `~` goes through the environment, as its operators do."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Generation(Extension):
    """`{% generation %}`, which marks answers for trainers; here it is what stands in it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Sandbox(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    intercepted_binops = frozenset({"*", "**", "+", "-", "%", "/", "//"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        # Before the operation runs: a product of text and a number takes its memory in one call.
        if isinstance(left, int) and isinstance(right, int):
            _allow_bits(operator, left, right)
        if operator == "%" and isinstance(left, str):
            values = [*right] if isinstance(right, tuple) else [right]
            _allow(_weight_of_format(left, values))
        elif operator == "*":
            # Of two numbers the digits add up; of a number and a sequence the sequence is repeated.
            numbers = isinstance(left, int | float) and isinstance(right, int | float)
            repeated = _weight(right if isinstance(left, int) else left) * _largest(left, right)
            _allow(_weight(left, right) if numbers else repeated)
        else:
            _allow(_weight(left, right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, called: Any, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(called, "__self__", None), getattr(called, "__name__", "")
        if isinstance(owner, str | bytes):
            args = tuple(map(_listed, args))
            _allow(_weight_of_call(name, [owner, *args, *kwargs.values()]))
        return super().call(context, called, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:
            given = [*args, *kwargs.values()]
            # `format_map` takes its values in one object.
            given += [v for arg in args if isinstance(arg, Mapping) for v in arg.values()]
            _allow(_weight_of_format(str(value.__self__), given))
            return formatted(*args, **kwargs)

        return update_wrapper(bounded, formatted)

    def joined(self, parts: Iterable[Any]) -> str:
        """The text of `a ~ b ~ c`."""
        values = list(parts)
        _allow(_weight(*values))
        return "".join(map(str, values))

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """The text of a template, a macro or a block, of its pieces."""
        # Weighed piece by piece, so that a template that writes without end is stopped while it writes.
        pieces, weight = [], 0
        for piece in parts:
            weight += len(piece)
            if weight > MOST:
                raise TooMuch(f"it makes more than {MOST:,} characters")
            pieces.append(piece)
        return "".join(pieces)


def _output(value: Any) -> Any:
    # Before a value becomes text: nested lists are short in memory and long in print.
    _allow(_weight(value))
    return value


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


@lru_cache(maxsize=1)
def _environment() -> _Sandbox:
    """With the functions, filters and whitespace rules that published chat templates are written for."""
    made = _Sandbox(trim_blocks=True, lstrip_blocks=True, finalize=_output, extensions=[_Generation, loopcontrols])
    # jinja's own `tojson` escapes HTML, which prompts must not have.
    made.filters["tojson"] = _to_json
    made.filters = {name: _weighed(name, call) for name, call in made.filters.items()}
    made.globals |= {"raise_exception": _raise, "strftime_now": _weighed("strftime_now", _now)}
    return made
