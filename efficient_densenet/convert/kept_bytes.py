"""What a module keeps for its backward pass, by shapes alone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

from efficient_densenet.convert.converted import converted_class
from efficient_densenet.convert.recording.arguments import stand_ins
from efficient_densenet.convert.recording.twin import Unrecordable, tensors_in, twin_of
from efficient_densenet.convert.state.values import Nest, class_of, set_class
from efficient_densenet.convert.survey import Found
from efficient_densenet.modules.recomputing import Recomputing, Settings


def kept_bytes(
    module: nn.Module, path: str, survey: Mapping[str, Found]
) -> tuple[int | None, int | None]:
    """Bytes of the result and of all that is kept besides parameters and input: naive, and now.

    ``None`` where that cannot be said, for a sequence among others: its modules have their own.
    What is below the module at ``path`` is as ``survey`` found it.
    """
    found = survey[path]
    if found.match is None or not issubclass(found.front, Recomputing):
        return None, None
    try:
        twin = twin_of(module).module
        naive = _kept(twin, found.args, found.kwargs)
        prefix = f"{path}." if path else ""
        for other, what in survey.items():
            if f"{other}.".startswith(prefix) and what.match is not None:
                below = other.removeprefix(path).removeprefix(".")
                _recompute(twin.get_submodule(below), module.get_submodule(below), what)
        return naive, _kept(twin, found.args, found.kwargs)
    except Unrecordable:
        return None, None


def _recompute(twin: nn.Module, module: nn.Module, found: Found) -> None:
    """Let the copy of a module recompute as the module does, or would be converted to do."""
    if not isinstance(twin, Settings):
        set_class(twin, converted_class(class_of(twin), found.front))
        found.teach(twin)
    if isinstance(module, Settings) and isinstance(twin, Settings):
        vars(twin)["_recomputing_mode"] = module.recompute


def _kept(twin: nn.Module, args: tuple[Nest, ...], kwargs: Mapping[str, Nest]) -> int:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with _disable_current_modes(), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args, kwargs = stand_ins(args), stand_ins(kwargs)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            saved += tensors_in(twin(*args, **kwargs))
    own = [*twin.parameters(), *twin.buffers(), *tensors_in((args, kwargs))]
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in saved}
    for tensor in own:
        sizes.pop(tensor.untyped_storage()._cdata, None)
    return sum(sizes.values())
