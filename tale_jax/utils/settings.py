"""Settings: fields of frozen dataclasses that say their default, unit, off value, choices and rule where they stand.

@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Group):
    learning_rate: float = setting(2e-3, "peak learning rate", positive)

dict_of_settings = {name: known for name, value, known in iter_settings(OptimizerConfig())}
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """What one value must satisfy: `field=value must {text}`. NaN satisfies none, as it compares to nothing."""

    text: str
    holds: Callable[[Any], bool]


def at_most(bound: int) -> Rule:
    return Rule(f"be at most {bound}", lambda value: value <= bound)


positive = Rule("be positive", lambda value: value > 0)
not_negative = Rule("not be negative", lambda value: value >= 0)
below_one = Rule("be at least 0 and below 1", lambda value: 0 <= value < 1)
share = Rule("be at least 0 and at most 1", lambda value: 0 <= value <= 1)
above_zero_share = Rule("be above 0 and at most 1", lambda value: 0 < value <= 1)
below_half = Rule("lie between 0 and 0.5", lambda value: 0 < value < 0.5)
SANE = {  # rules of a type, for every setting of it
    int: (Rule("fit into 64 bits", lambda value: -(1 << 63) <= value < 1 << 63),),
    float: (Rule("be finite", math.isfinite),),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is known of a setting."""

    default: Any  # its type is that of the setting
    doc: str  # what it is, with its unit
    rules: tuple[Rule, ...] = ()  # for the value alone, whatever the other settings are
    choices: tuple[str, ...] = ()
    off: str = ""  # what the value 0, or "", stands for; "": nothing special
    usual: Any = None  # a value that a remedy may suggest; None: the default
    free: bool = False  # a run may go on with another value, and records that

    @property
    def help(self) -> str:
        """One line: what it is, the choices, and what the off value stands for."""
        choices = f": {', '.join(self.choices)}" if self.choices else ""
        return self.doc + choices + (f"; {format_value(type(self.default)())}: {self.off}" if self.off else "")

    def read(self, name: str, value: Any) -> Any:
        """The value in the type of the setting, which is called `name`. Raises ValueError where it breaks a rule."""
        kind, usual = type(self.default), self.default if self.usual is None else self.usual
        remedy = f"try {format_value(usual)}"
        if self.off:
            remedy += f", or {format_value(kind())} ({self.off})" if usual else f" ({self.off})"
        if kind is float and type(value) is int and abs(value) < 1e300:
            value = float(value)
        if type(value) is not kind:
            raise mistake(name, value, f"be of type {kind.__name__}", remedy)
        if self.choices and value not in self.choices:
            near = difflib.get_close_matches(str(value), self.choices, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"try {self.choices[0]}"
            raise mistake(name, value, f"be one of {', '.join(self.choices)}", remedy)
        for rule in (*self.rules, *SANE.get(kind, ())):
            if not rule.holds(value):
                raise mistake(name, value, rule.text, remedy)
        return value


def setting(default: Any, doc: str, *rules: Rule, **more: Any) -> Any:
    """A field that is a `Setting`; `more` are choices, off, usual or free."""
    return dataclasses.field(default=default, metadata={"setting": Setting(default, doc, rules, **more)})


def group(kind: type["Group"], free: bool = False) -> Any:
    """A field that is a group of settings: all of them `free`, or each as it says."""
    return dataclasses.field(default_factory=kind, metadata={"free": free})


Broken = Iterator[tuple[str, str, str]]  # of each rule that does not hold: field=value must RULE; REMEDY


class Group:
    """Settings that belong together."""

    def broken(self) -> Broken:
        """The rules between its settings that do not hold; each setting by itself is known to be right."""
        return iter(())


def iter_settings(part: Any, prefix: str = "", free: bool = False) -> Iterator[tuple[str, Any, Setting]]:
    """Every setting in a group and its groups: dotted name, value, and what is known of it, in order."""
    for field in dataclasses.fields(part):
        name, value = prefix + field.name, getattr(part, field.name)
        if isinstance(value, Group):
            yield from iter_settings(value, f"{name}.", field.metadata["free"])
        else:
            known = field.metadata["setting"]
            yield name, value, dataclasses.replace(known, free=free or known.free)


def nearest_divisor(number: int, wanted: int, least: int = 1) -> int:
    """The divisor of `number`, at least `least`, that is nearest to `wanted`; the smaller of two."""
    wanted = min(max(wanted, least), number)
    outwards = (d for distance in range(number) for d in (wanted - distance, wanted + distance))
    return next(d for d in outwards if d >= least and number % d == 0)


def format_value(value: Any) -> str:
    """A value for an error message: one line, and not a long one."""
    if isinstance(value, str):
        text = f'"{value}"' if value.isprintable() else ascii(value)
    else:
        text = repr(value) if value is None or isinstance(value, bool | int | float) else f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}..."


def mistake(name: str, value: Any, rule: str, remedy: str) -> ValueError:
    """The error of a setting that breaks a rule."""
    return ValueError(f"{name}={format_value(value)} must {rule}; {remedy}")
