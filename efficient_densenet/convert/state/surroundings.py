"""What the code of a module finds outside of it: globals, what functions enclose, classes.

Only code that a forward function can come to by name is read, and none of PyTorch's or of other
installed libraries: whatever these call is taken to stay what it is.
"""

from __future__ import annotations

import builtins
import dis
import functools
import sys
from collections.abc import Callable, Iterable
from functools import cached_property, partial, partialmethod
from types import CodeType, FunctionType, ModuleType
from typing import NamedTuple

from efficient_densenet.convert.state.values import Describer, Nest, TooLarge, is_constant, is_same

FOREIGN = {"torch", "numpy", "efficient_densenet", *sys.stdlib_module_names}
INSTALLED = ("site-packages", "dist-packages")
AROUND: dict[type, str] = {
    **dict.fromkeys((staticmethod, classmethod), "__func__"),
    property: "fget",
    **dict.fromkeys((cached_property, partialmethod), "func"),
    functools._lru_cache_wrapper: "__wrapped__",
}
"""What may stand around a method, and where it keeps it."""
NOT_RUN = {
    *("__init__", "__new__", "__post_init__", "__init_subclass__", "__repr__", "__str__"),
    *("__getstate__", "__setstate__", "__reduce__", "__reduce_ex__", "__copy__", "__deepcopy__"),
}
"""Special methods that no forward function comes to; it may come to all others without a name."""
MISSING = object()


class Found(NamedTuple):
    """A value that code found.

    Attributes:
        name: what the code calls it.
        get: finds it again.
        put: lets code find something else.
        value: what it was if it can only be replaced, else its description.
        is_constant: whether it can only be replaced.
    """

    name: str
    get: Callable[[], Nest]
    put: Callable[[Nest], object]
    value: Nest
    is_constant: bool

    def fits(self, describe: Describer) -> bool:
        """Whether it is still the same."""
        found = self.get()
        if self.is_constant:
            return is_same(found, self.value)
        try:
            return bool(describe(found) == self.value)
        except TooLarge:
            return False


class Surroundings:
    """What code finds outside of a module, at one moment.

    Attributes:
        found: all that it finds.
        classes: those of the user's own that it comes to.
        caches: what keeps the results of functions that it comes to.

    Args:
        classes: those of the modules.
        code: functions and classes that the modules hold.
        describe: describes what is found, and will do so in the same order.

    Raises:
        TooLarge: if there is more than ``describe`` may look at.
    """

    def __init__(self, classes: Iterable[type], code: Iterable[Nest], describe: Describer) -> None:
        self.found: list[Found] = []
        self.classes: list[type] = []
        self.caches: list[Nest] = []
        own = [cls for cls in classes if not is_foreign(cls)]
        self._roots = {_root(cls) for cls in own}
        self._describe = describe
        self._seen: set[tuple[int, str]] = set()
        self._mentioned = {"forward"}
        self._methods: list[tuple[str, Nest]] = []
        waiting = [*own, *code]
        while waiting:
            describe.code = []
            for thing in waiting:
                self._read(thing)
            waiting = [*describe.code, *self._called()]

    def fit(self, describe: Describer) -> bool:
        """Whether code would find the same."""
        return all([found.fits(describe) for found in self.found])

    def _called(self) -> list[Nest]:
        """The methods that may be called by what was read, each once."""
        called: list[tuple[str, Nest]] = []
        left: list[tuple[str, Nest]] = []
        for name, method in self._methods:
            is_special = name.startswith("__") and name not in NOT_RUN
            (called if is_special or name in self._mentioned else left).append((name, method))
        self._methods = left
        return [method for _, method in called]

    def _read(self, thing: Nest) -> None:
        if isinstance(thing, type):
            for base in thing.__mro__:
                if self._is_own(base) and base not in self.classes:
                    self._read_class(base)
        else:
            if isinstance(thing, functools._lru_cache_wrapper):
                self.caches.append(thing)
            function = _function_in(thing)
            if function is not None and self._is_own(function) and self._is_new(function, ""):
                self._read_function(function)

    def _read_class(self, cls: type) -> None:
        self.classes.append(cls)
        for name, value in [*vars(cls).items()]:
            if _function_in(value) is not None:
                self._methods.append((name, value))
            elif not name.startswith(("__", "_abc_")):
                get, put = partial(vars(cls).get, name, MISSING), partial(setattr, cls, name)
                self._add(f"{cls.__name__}.{name}", get, put)

    def _read_function(self, function: FunctionType) -> None:
        names, attributes = _names_in(function.__code__)
        self._mentioned |= attributes
        self._find(function.__globals__, names, attributes)
        enclosed = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        for name, cell in enclosed:
            if self._is_new(cell, ""):
                get, put = _access(cell, "cell_contents")
                self._add(name, get, put, get() is MISSING)
                self._enter(get(), attributes, f"{name}.", ())
        for name in ("__defaults__", "__kwdefaults__", "__dict__"):
            if getattr(function, name):
                self._add(f"{function.__name__}.{name}", *_access(function, name))

    def _find(
        self,
        space: dict[str, Nest],
        names: Iterable[str],
        attributes: frozenset[str],
        prefix: str = "",
        within: tuple[ModuleType, ...] = (),
    ) -> None:
        """Look at ``names`` in a Python module; if they are modules, at ``attributes`` in these."""
        is_foreign = any(_root_of(module.__name__) in FOREIGN for module in within)
        for name in names:
            value = space.get(name, MISSING)
            if value is MISSING and (within or hasattr(builtins, name)):
                continue
            if self._is_new(space, name):
                get, put = partial(space.get, name, MISSING), partial(_set_global, space, name)
                self._add(prefix + name, get, put, is_foreign or value is MISSING)
            self._enter(value, attributes, f"{prefix}{name}.", within)

    def _enter(
        self, value: Nest, attributes: frozenset[str], prefix: str, within: tuple[ModuleType, ...]
    ) -> None:
        if isinstance(value, ModuleType) and value not in within:
            self._find(vars(value), attributes, attributes, prefix, (*within, value))

    def _add(
        self,
        name: str,
        get: Callable[[], Nest],
        put: Callable[[Nest], object],
        is_only_replaced: bool = False,
    ) -> None:
        value = get()
        constant = is_only_replaced or is_constant(value)
        description = None if is_only_replaced else self._describe(value)
        self.found.append(Found(name, get, put, value if constant else description, constant))
        if self._describe.limit is not None and len(self.found) > self._describe.limit:
            raise TooLarge

    def _is_new(self, space: object, name: str) -> bool:
        key = id(space), name
        is_new = key not in self._seen
        self._seen.add(key)
        return is_new

    def _is_own(self, thing: type | FunctionType) -> bool:
        """Whether it belongs to what the modules are written in, and not to a library."""
        name, file = _home(thing)
        root = _root_of(name)
        if root in self._roots or root in FOREIGN:
            return root in self._roots
        return not any(folder in file for folder in INSTALLED)


def is_foreign(cls: type) -> bool:
    """Whether a class is PyTorch's, or of what else is not read."""
    return _root(cls) in FOREIGN


def _root(thing: type | FunctionType) -> str:
    return _root_of(_home(thing)[0])


def _home(thing: type | FunctionType) -> tuple[str, str]:
    """Name and file of the Python module that something was written in, whatever wraps it."""
    if isinstance(thing, FunctionType):
        name, file = (thing.__globals__.get(key) for key in ("__name__", "__file__"))
    else:
        name = thing.__module__
        file = getattr(sys.modules.get(name), "__file__", None)
    return str(name or ""), str(file or "")


def _root_of(name: str) -> str:
    return name.partition(".")[0]


def _function_in(thing: Nest) -> FunctionType | None:
    """The function that runs when a member of a class, or what stands around it, is called."""
    if isinstance(thing, FunctionType):
        wrapped = getattr(thing, "__wrapped__", None) if _root(thing) in FOREIGN else None
        return _function_in(wrapped) or thing
    name = AROUND.get(type(thing))
    return None if name is None else _function_in(getattr(thing, name))


def _access(thing: Nest, name: str) -> tuple[Callable[[], Nest], Callable[[Nest], object]]:
    """What reads an attribute, and what sets it; one that is not there is ``MISSING``."""

    def get() -> Nest:
        try:
            return getattr(thing, name)
        except ValueError:  # of a cell that is empty
            return MISSING

    def put(value: Nest) -> None:
        delattr(thing, name) if value is MISSING else setattr(thing, name, value)

    return get, put


def _set_global(space: dict[str, Nest], name: str, value: Nest) -> None:
    if value is MISSING:
        del space[name]
    else:
        space[name] = value


@functools.lru_cache(4096)
def _names_in(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The globals that code and the functions in it read or set, and attributes of anything."""
    names, attributes = set(), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL"):
            names.add(instruction.argval)
        elif "ATTR" in instruction.opname or instruction.opname == "LOAD_METHOD":
            attributes.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner_names, inner_attributes = _names_in(constant)
            names |= inner_names
            attributes |= inner_attributes
    return frozenset(names), frozenset(attributes)
