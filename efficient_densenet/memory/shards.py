"""What one process of several holds while it trains a model after ``fully_shard`` (FSDP2).

The model runs on whole parameters, of which no bytes are counted. Beside it, hooks allocate and
free what FSDP2 does, at the same moments: parameters that are gathered from all processes and freed
again, and gradients that are reduced to this process's shard.

Source: ``torch/distributed/fsdp/_fully_shard`` in torch 2.14, and measured with gloo.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.function import FunctionCtx
from torch.utils._pytree import tree_map

from efficient_densenet.kernels.layout import device_of
from efficient_densenet.memory.batch import tensors_in
from efficient_densenet.memory.sharding import Sharding


def run_sharded(model: nn.Module) -> list[nn.Parameter] | None:
    """From now on a hollow copy allocates and frees as a sharded model does; its shards.

    ``None`` if no module of ``model`` was sharded.
    """
    plan = _Plan()
    taken: set[int] = set()
    for module in reversed(list(model.modules())):
        sharding = vars(module).get("sharding")
        if isinstance(sharding, Sharding):
            own = [p for p in module.parameters() if id(p) not in taken]
            taken.update(map(id, own))
            plan.groups.append(_Group(module, sharding, own, plan))
    if not plan.groups:
        return None
    shards = {id(whole): shard for group in plan.groups for whole, shard in group.pairs}
    return [shards.get(id(parameter), parameter) for parameter in model.parameters()]


class _Plan:
    """What the groups of a model share.

    Attributes:
        groups: the innermost first.
        order: groups in the order in which their forward passes ended.
        copied: what was gathered for the group that was copied last in the forward pass.
        sent: what the gradients of the last group were sent from.
        is_ending: whether the end of the backward pass is awaited.
    """

    def __init__(self) -> None:
        self.groups: list[_Group] = []
        self.order: list[_Group] = []
        self.copied: Tensor | None = None
        self.sent: Tensor | None = None
        self.is_ending = False

    def end(self) -> None:
        """The backward pass is over."""
        for group in reversed(self.groups):
            if group.phase != "after":
                group.reduce()
            group.finish()
        self.order.clear()
        self.sent, self.is_ending = None, False


class _Group:
    """The parameters of one call of ``fully_shard``: they are gathered and reduced together.

    Attributes:
        pairs: whole parameters, and the shards of this process.
        phase: ``"idle"``, ``"forward"``, ``"backward"`` or ``"after"`` its backward pass.
    """

    def __init__(
        self, module: nn.Module, sharding: Sharding, parameters: list[nn.Parameter], plan: _Plan
    ) -> None:
        self._sharding, self._plan, self.phase = sharding, plan, "idle"
        self.pairs = [(whole, _shard(whole, sharding)) for whole in parameters]
        self._gathered: Tensor | None = None
        self._whole: list[Tensor] = []
        self._places: list[int] = []
        module.register_forward_pre_hook(self._before_forward, prepend=True, with_kwargs=True)
        module.register_forward_hook(self._after_forward)

    def gather(self) -> None:
        """Collect the shards of all processes, unless they are there."""
        alone = self._sharding.processes == 1
        if self._gathered is None and not self._whole and not alone and self.pairs:
            self._gathered = self._flat(whole for whole, _ in self.pairs)

    def reduce(self) -> None:
        """Free the whole parameters, and keep of the gradients this process's shards."""
        self.phase, self._whole = "after", []
        there = [(whole, shard) for whole, shard in self.pairs if whole.grad is not None]
        self._plan.sent = None
        if not there:
            return
        sent = self._flat(whole for whole, _ in there)
        for whole, _ in there:
            whole.grad = None
        received = sent.new_empty(sent.numel() // self._sharding.processes)
        if self._sharding.processes > 1 and device_of(sent).type == "cpu":
            sent.clone()  # in which gloo sums
        place = 0
        for whole, shard in there:
            gradient = received.as_strided(shard.shape, shard.stride(), place)
            place += _padded(whole, self._sharding) // self._sharding.processes
            if shard.grad is None:
                shard.grad = gradient
            else:
                shard.grad += gradient
        self._plan.sent = sent

    def finish(self) -> None:
        """The backward pass of the whole model is over."""
        self.phase, self._gathered = "idle", None
        self._places.clear()

    def _copy_out(self, forward: bool) -> None:
        if self._whole:
            return
        if forward:
            self._plan.copied = None
        self._whole = [self._flat([whole]) for whole, _ in self.pairs]
        self._plan.copied = self._gathered if forward else None
        self._gathered = None

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.phase == "backward":  # what is run again there
            return None
        self.phase = "forward"
        self.gather()
        self._copy_out(forward=True)
        given = [tensor for tensor in tensors_in((args, kwargs)) if tensor.requires_grad]
        if given and torch.is_grad_enabled():
            watched = dict(zip(map(id, given), _Watched.apply(self, *given), strict=True))
            args, kwargs = tree_map(lambda leaf: watched.get(id(leaf), leaf), (args, kwargs))
        return args, kwargs

    def _after_forward(self, module: nn.Module, args: object, output: object) -> None:
        if self.phase == "backward":
            return
        if self._sharding.frees:
            self._whole = []
        self._places.append(len(self._plan.order))
        self._plan.order.append(self)
        self.phase = "idle"
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(self._before_backward)
        if self._sharding.is_root:
            self._plan.copied = None

    def _before_backward(self, gradient: Tensor) -> None:
        if not self._plan.is_ending:
            self._plan.is_ending = True
            Variable._execution_engine.queue_callback(self._plan.end)
        if self.phase == "backward":
            return
        self.phase = "backward"
        self.gather()
        self._copy_out(forward=False)
        place = self._places.pop() if self._places else 0
        if place:
            self._plan.order[place - 1].gather()

    def _flat(self, whole: Iterable[Tensor]) -> Tensor:
        """Room for ``whole``, each padded to equal shards."""
        whole = list(whole)
        size = sum(_padded(tensor, self._sharding) for tensor in whole)
        return torch.empty(size, dtype=whole[0].dtype, device=whole[0].device)


class _Watched(torch.autograd.Function):
    """Passes what a group's module is called with; its backward pass follows the module's."""

    @staticmethod
    def forward(ctx: FunctionCtx, group: _Group, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group  # type: ignore[attr-defined]
        return inputs

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.group.reduce()  # type: ignore[attr-defined]
        return (None, *gradients)


def _shard(whole: nn.Parameter, sharding: Sharding) -> nn.Parameter:
    """This process's rows of ``whole``, at the start of a storage with as many as any has."""
    most = math.ceil(len(whole) / sharding.processes)
    rows = min(max(len(whole) - most * sharding.rank, 0), most)
    padded = torch.empty((most, *whole.shape[1:]), dtype=whole.dtype, device=whole.device)
    return nn.Parameter(padded[:rows], requires_grad=whole.requires_grad)


def _padded(whole: Tensor, sharding: Sharding) -> int:
    """Values of ``whole`` with as many rows as equal shards have."""
    rows = math.ceil(len(whole) / sharding.processes) * sharding.processes
    return rows * (whole.numel() // len(whole))
