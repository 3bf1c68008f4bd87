"""What a forward function asks of tensors and of PyTorch, or does to them, that is no operation."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils.checkpoint import CheckpointFunction

from efficient_densenet.convert.recording.graph import Arguments, Function, Keywords
from efficient_densenet.convert.recording.twin import tensors_in
from efficient_densenet.convert.state.values import Nest

ANSWERED_ALIKE = {"dim", "ndim", "ndimension", "__setitem__"}
"""What Python may ask of a map: the answer is the same for every map."""
KNOWN_OF_OWN = {"shape", "size", "numel", "nelement", "__len__"}
"""What it may ask of a parameter besides, since a change of it is seen."""
OPEN = {"requires_grad", "is_leaf"}
"""What has two answers, of which both can be tried."""
CONVERSIONS = {
    *("to", "type", "type_as", "float", "double", "half", "bfloat16", "cuda", "cpu", "xpu"),
}
"""What may do nothing to a stand-in, and something to a map."""
CHANGES = {"requires_grad_", "register_hook", "register_post_accumulate_grad_hook", "retain_grad"}
"""What does something to a tensor beside its values."""
OF_THE_GRAPH = {*OPEN, "grad", "grad_fn", "retains_grad"}
"""What is another thing for the tensors of a second run."""
PASSED_ON = {"torch._tensor", "torch.overrides", "torch.functional"}
"""Modules of PyTorch through which a call of a tensor's methods passes."""
QUESTIONS = (
    *("is_grad_enabled", "is_inference_mode_enabled", "get_default_dtype"),
    *("is_autocast_enabled", "is_autocast_cpu_enabled"),
    *("get_autocast_dtype", "get_autocast_gpu_dtype", "get_autocast_cpu_dtype"),
)
"""Functions of PyTorch that tell in which mode it is; not every version has all."""
SETTERS = (
    *("set_autocast_enabled", "set_autocast_cpu_enabled"),
    *("set_autocast_dtype", "set_autocast_cpu_dtype", "set_autocast_gpu_dtype"),
)
"""Functions of PyTorch that set a mode; not every version has all."""
MODES: dict[Any, str] = {torch.autocast: "an autocast", torch.inference_mode: "an inference mode"}
ONE_AT_A_TIME = threading.RLock()
"""Held while something of PyTorch is replaced."""
NOTHING = object()


class Listener(Protocol):
    """Is told what a forward function asks and does."""

    paths: Mapping[int, str]

    def note(self, text: str, repeats: bool = True) -> None:
        """It learns or does something: a predicate, and whether a second run would do so too."""

    def note_checkpoint(self) -> None:
        """It runs a function in a reentrant checkpoint."""

    def answer(self, question: str, text: str, answer: Nest) -> Nest:
        """It asks a question, by name, and as a predicate; what it is to be told."""


class Functions(TorchFunctionMode):
    """Tells of all functions of PyTorch that take tensors.

    Attributes:
        inside: whether one is running.
        autocast: what autocast was when the last one began: operations themselves do not see it.
    """

    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self.listener = listener
        self.inside = False
        self.autocast = autocast_now()

    def __torch_function__(
        self, func: Function, types: object, args: Arguments = (), kwargs: Keywords | None = None
    ) -> Nest:
        kwargs = kwargs or {}
        outer, self.inside = self.inside, True
        self.autocast = autocast_now()
        theirs = not called_by_pytorch(2)
        name = _name(func)
        if name == "_set_grad_enabled" and args[0] and not _leaves_mode():
            self.listener.note("enables gradients of its own")
        try:
            result = func(*args, **kwargs)
        except Exception:
            if theirs:
                self.listener.note(f"catches that {name} fails on stand-ins")
            raise
        finally:
            self.inside = outer
        if theirs or name in CHANGES:
            return self._heard(name, args, kwargs, result)
        return result

    def _heard(self, name: str, args: Arguments, kwargs: Keywords, result: Nest) -> Nest:
        given = [*tensors_in((args, kwargs))]
        own = all(id(tensor) in self.listener.paths for tensor in given)
        learns = not any(True for _ in tensors_in((result,)))
        name, _, sets = name.partition(".")
        alike = name in ANSWERED_ALIKE or (name == "size" and args[1:] == (1,))
        if not given or alike or (own and name in KNOWN_OF_OWN):
            return result
        whose = "a parameter or buffer" if own else "a map"
        asks = f"asks {whose} for its {name}"
        if sets:
            self.listener.note(f"sets the {name} of {whose}", repeats=False)
        elif name in CHANGES:
            hooks_map = not own and name != "requires_grad_"
            self.listener.note(f"calls {name} on {whose}", repeats=hooks_map)
        elif name in OPEN:
            return self.listener.answer(name, asks, result)
        elif learns or name in CONVERSIONS:
            text = asks if learns else f"converts {whose} ({name})"
            self.listener.note(text, repeats=name not in OF_THE_GRAPH)
        return result


def _name(func: Function) -> str:
    """``shape`` for the getter of ``Tensor.shape``, ``shape.__set__`` for its setter."""
    name = (resolve_name(func) or getattr(func, "__name__", str(func))).removesuffix(".__get__")
    setter = name.endswith(".__set__")
    return ".".join(name.split(".")[-2 if setter else -1 :])


@contextmanager
def told_to(listener: Listener, module: nn.Module) -> Iterator[None]:
    """A context in which ``listener`` is told, too, what ``module`` asks PyTorch itself.

    That is what this thread asks, by the names of PyTorch or of the Python modules in which the
    classes of ``module`` and its parts are defined.

    A reentrant checkpoint runs its function as if there were none: otherwise autograd sees none of
    its operations, and nothing tells which of them it would not see without the checkpoint either.
    """
    thread = threading.get_ident()

    def is_ours() -> bool:
        return threading.get_ident() == thread

    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        if is_ours():
            listener.note_checkpoint()
        return function(*args)

    def asking(name: str, usual: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*args: Any, **kwargs: Any) -> Any:
            answer = usual(*args, **kwargs)
            if is_ours() and not called_by_pytorch(2):
                return listener.answer(name, f"asks PyTorch {name}", answer)
            return answer

        return ask

    def setting(name: str, usual: Callable[..., Any]) -> Callable[..., Any]:
        def set_mode(*args: Any) -> Any:
            if is_ours() and not called_by_pytorch(2):
                listener.note(f"calls {name}")
            return usual(*args)

        return set_mode

    def entering(what: str, usual: Callable[..., Any]) -> Callable[..., Any]:
        def enter(mode: Any) -> Any:
            if is_ours():
                listener.note(f"enters {what} of its own")
            return usual(mode)

        return enter

    with ONE_AT_A_TIME, ExitStack() as stack:
        stack.enter_context(_replaced(CheckpointFunction, "apply", staticmethod(apply)))
        told = {name: asking(name, usual) for name, usual in _functions(QUESTIONS)}
        told |= {name: setting(name, usual) for name, usual in _functions(SETTERS)}
        for space, name, usual in [*_named(module)]:
            stack.enter_context(_replaced(space, name, told[usual]))
        for mode, what in MODES.items():
            stack.enter_context(_replaced(mode, "__enter__", entering(what, mode.__enter__)))
        yield


def _functions(names: Iterable[str]) -> list[tuple[str, Function]]:
    return [(name, getattr(torch, name)) for name in names if hasattr(torch, name)]


def _named(module: nn.Module) -> Iterator[tuple[ModuleType, str, str]]:
    """Where functions that are asked, or set modes, have names: the name there, and their own."""
    found = {id(function): name for name, function in _functions((*QUESTIONS, *SETTERS))}
    classes = {cls for part in module.modules() for cls in type(part).__mro__}
    spaces = {cls.__module__ for cls in classes if not cls.__module__.startswith("torch.")}
    for space in (torch, torch._C, *filter(None, map(sys.modules.get, spaces))):
        for name, value in vars(space).items():
            if id(value) in found:
                yield space, name, found[id(value)]


@contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    before = vars(owner).get(name, NOTHING)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is NOTHING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def called_by_pytorch(above: int) -> bool:
    """Whether PyTorch's own Python code called the function so many frames above this one."""
    frame = sys._getframe(above)
    while frame.f_back is not None and frame.f_globals.get("__name__") in PASSED_ON:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__")).partition(".")[0] == "torch"


def _leaves_mode() -> bool:
    """Whether the function that is being handled puts back what a mode of autograd found."""
    frame = sys._getframe(2)
    names = {frame.f_code.co_name, frame.f_back.f_code.co_name if frame.f_back else ""}
    return "__exit__" in names and frame.f_globals.get("__name__") == "torch.autograd.grad_mode"


_ask_grad, _ask_autocast, _ask_dtype = (
    torch.is_grad_enabled,
    torch.is_autocast_enabled,
    torch.get_autocast_dtype,
)


def is_grad_enabled() -> bool:
    """Whether autograd is on; nobody is told."""
    return _ask_grad()


def autocast_now() -> tuple[object, ...]:
    """The mode of autocast."""
    return tuple([(_ask_autocast(device), _ask_dtype(device)) for device in ("cpu", "cuda")])


def context_now() -> tuple[object, ...]:
    """The modes of autograd and of autocast."""
    return is_grad_enabled(), *autocast_now()
