"""How ``fully_shard`` (FSDP2) has sharded a model, and copies of it that are whole again."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

_ADDED = "__composable_api"
"""How the names of those attributes of a module begin in which ``fully_shard`` keeps its own."""

_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks")


class Sharding(NamedTuple):
    """How one call of ``fully_shard`` divides the parameters of a module.

    Attributes:
        processes: that have equally many rows of each parameter, the last ones padded.
        rank: which of them this one is.
        frees: whether whole parameters are freed after the forward pass, and gathered again.
        is_root: whether no other sharded module holds this one.
    """

    processes: int
    rank: int
    frees: bool
    is_root: bool


def is_sharded(parameter: Tensor) -> bool:
    """Whether a parameter is one process's part of it."""
    # Where nobody has imported the module, which takes seconds, there is no such tensor.
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(parameter, tensors.DTensor)


def has_shards(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on ``model`` or a module in it."""
    return any(True for _ in _sharded_modules(model))


def why_shards_unknown(model: nn.Module) -> str | None:
    """What of the shards in ``model`` is not known, as a noun."""
    own: set[int] = set()
    for module in _sharded_modules(model):
        state = module._get_fsdp_state()
        groups = state._fsdp_param_groups
        own.update(id(p.sharded_param) for group in groups for p in group.fsdp_params)
        if len(state._modules) > 1 or len(groups) > 1:
            return "several modules or meshes in one call of fully_shard"
        for group in groups:
            why = _why_group_unknown(group)
            if why is not None:
                return why
    if {id(p) for p in model.parameters() if is_sharded(p)} != own:
        return "shards that fully_shard has not made, or has gathered"
    return None


def _why_group_unknown(group: Any) -> str | None:
    policy = group.mp_policy
    if policy.param_dtype or policy.reduce_dtype or policy.output_dtype:
        return "a mixed-precision policy"
    if type(group.offload_policy).__name__ != "OffloadPolicy":
        return "parameters that are offloaded"
    shards = [p.sharded_param for p in group.fsdp_params]
    if any(shard.device_mesh.ndim != 1 or not shard.placements[0].is_shard(0) for shard in shards):
        return "a mesh of several dimensions, or a dimension other than the first divided"
    if group.post_forward_mesh_info not in (None, group.mesh_info):
        return "a number in place of reshard_after_forward"
    return None


def replace_sharded(model: nn.Module, memo: dict[int, object]) -> None:
    """Let ``copy.deepcopy(model, memo)`` have modules as they were before ``fully_shard``.

    Their attribute ``sharding`` then says how they were sharded.
    """
    found = list(_sharded_modules(model))
    inner = {id(below) for module in found for below in module.modules() if below is not module}
    for module in reversed(found):
        memo[id(module)] = _whole(module, id(module) not in inner, memo)


def _sharded_modules(model: nn.Module) -> Iterator[Any]:
    """Those whose class ``fully_shard`` has replaced."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        yield from (module for module in model.modules() if isinstance(module, fsdp.FSDPModule))


def _whole(module: Any, is_root: bool, memo: dict[int, object]) -> nn.Module:
    state = module._get_fsdp_state()
    handles = (state._pre_forward_hook_handle, state._post_forward_hook_handle)
    added = {handle.id for handle in handles}
    kept = {name: value for name, value in vars(module).items() if not name.startswith(_ADDED)}
    for name in _HOOKS:
        kept[name] = type(kept[name])((i, h) for i, h in kept[name].items() if i not in added)
    original: Any = type(module).__mro__[2]  # behind the new class and FSDPModule
    if getattr(original, "_recomputing_is_recorded", False):
        original = (
            original._recomputing_original
        )  # a sharded one is naive: there is no copy to record
    whole: nn.Module = object.__new__(original)
    memo[id(module)] = whole  # what is in it may refer to it
    vars(whole).update(copy.deepcopy(kept, memo))
    for group in state._fsdp_param_groups:
        shard = group.fsdp_params[0].sharded_param
        frees = group._reshard_after_forward and not (is_root and state._auto_reshard_after_forward)
        mesh = shard.device_mesh
        vars(whole)["sharding"] = Sharding(mesh.size(), mesh.get_local_rank(), frees, is_root)
    return whole
