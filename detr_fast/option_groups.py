"""Common ground of all classes of options: groups whose flags have no prefix, and options without effect."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, replace
from typing import Any, ClassVar, Self, get_type_hints

from detr_fast.config import Checked


@dataclass(frozen=True)
class Idle:
    """An option that has no effect beside others: `detr_fast.command.run` refuses it where it is given by name."""

    option: str
    when: Callable[[Any], bool]
    """Tells whether these options leave it without effect."""
    why: str
    """Names the other option, and after a colon what to do."""

    def message(self) -> str:
        name = f"--{self.option.replace('_', '-')}"
        return f"{name} has no effect {self.why}, or leave {name} out."


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Options of a command, or a group of them: a field is a flag of its name, or a group, which adds no prefix.

    A group may have groups, and a command's may be of a class derived from the field's type, as its default is.
    As a dict, and in a checkpoint, they are flat: by name, without the groups.
    """

    idle: ClassVar[tuple[Idle, ...]] = ()
    """Those of its own fields; a group has its own."""

    @classmethod
    def field_types(cls) -> dict[str, Any]:
        """Return the type of each option by its name, those of the groups too."""
        return _types(cls, {each.name: default_of(each) for each in fields(cls)})

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Build from options by name, whatever group each is in."""
        return cls(**cls.arguments(values))

    @classmethod
    def arguments(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Return `values`, by name, as the constructor takes them: in their groups."""
        made = {each.name: default_of(each) for each in fields(cls)}
        return _in_groups(cls, {name: each for name, each in made.items() if isinstance(each, Options)}, values)

    def but(self, **changes: Any) -> Self:
        """Return the same with `changes`, by name, whatever group each is in."""
        return replace(self, **_in_groups(type(self), dict(self.nested()), changes))

    def nested(self) -> Iterator[tuple[str, "Options"]]:
        """Yield the groups that these are composed of, by name."""
        for each in fields(self):
            if isinstance(part := getattr(self, each.name), Options):
                yield each.name, part

    def parts(self) -> Iterator["Options"]:
        """Yield these options and every group in them, those of groups too."""
        yield self
        for _, group in self.nested():
            yield from group.parts()

    def to_dict(self) -> dict[str, Any]:
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        for name, part in self.nested():
            del own[name]
            own |= part.to_dict()
        return own


def default_of(field: Field[Any]) -> Any:
    """Return what a field holds where nothing is given; MISSING where it has to be."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def flags(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield options by name as the words of a command line; one that is None is not given."""
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        elif isinstance(value, tuple):
            yield from (f"--{flag}", *map(str, value))
        elif value is not None:
            yield from (f"--{flag}", str(value))


def _types(kind: type[Options], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the types of the options of `kind`, in groups of the classes that those in `values` are of."""
    found: dict[str, Any] = {}
    kinds = get_type_hints(kind)
    for name, value in values.items():
        found |= _types(type(value), vars(value)) if isinstance(value, Options) else {name: kinds[name]}
    return found


def _in_groups(kind: type[Options], groups: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return `values` as arguments of `kind`: those that are a group's as that group with them."""
    own = {each.name: values[each.name] for each in fields(kind) if each.name in values}
    rest = {name: value for name, value in values.items() if name not in own}
    for name, part in groups.items():
        inside = {key: rest.pop(key) for key in part.field_types() if key in rest}
        if inside:
            own[name] = own.get(name, part).but(**inside)
    if rest:
        raise TypeError(f"{kind.__name__} has no option {', '.join(rest)}")
    return own
