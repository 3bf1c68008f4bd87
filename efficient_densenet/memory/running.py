"""One training step as it runs, whoever watches it and whether or not tensors have values."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from efficient_densenet.memory.batch import Batch, Tree, tensors_in
from efficient_densenet.memory.budget import MeteredBudget, enforce
from efficient_densenet.memory.events import find_peak, live_after_forward
from efficient_densenet.memory.meter import LiveMeter
from efficient_densenet.memory.optimizers import (
    MakeOptimizer,
    build_optimizer,
    create_state,
    state_of,
)
from efficient_densenet.memory.profiler import AllocatorRecord
from efficient_densenet.memory.replicas import allot_buckets, why_wrapper_unknown
from efficient_densenet.memory.report import StepReport
from efficient_densenet.memory.sharding import why_shards_unknown
from efficient_densenet.memory.shards import run_sharded

Loss = Callable[..., Tensor]
Phase = Callable[[str], AbstractContextManager[object]]


class RunningStep:
    """A training step of a model that it may change, and what lives around it.

    Args:
        model: the step's own.
        batch: what it reads.
        loss_fn: ``cross_entropy`` unless given, where there is a target.
        autocast_dtype: of mixed precision, ``None`` for none.
        accumulate: whether gradients are there before the step, to which it adds.

    Attributes:
        parameters: what this process holds of the model's: all of them, or its shards.
        optimizer: whose step ends this one, ``None`` for none.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        loss_fn: Loss | None,
        autocast_dtype: torch.dtype | None,
        accumulate: bool = False,
    ) -> None:
        self.model = model
        self.parameters = run_sharded(model) or list(model.parameters())
        self._buckets = allot_buckets(model)
        self._accumulate = accumulate
        self.optimizer: Optimizer | None = None
        self._batch, self._autocast_dtype = batch, autocast_dtype
        self._target: Tree = None
        self._budget: MeteredBudget | None = None
        self._loss_fn = loss_fn
        if loss_fn is None and batch.indices is not None:
            self._loss_fn = _cross_entropy
        self._inputs = tensors_in(batch.inputs)
        if not self._inputs:
            raise ValueError(f"inputs must hold at least one tensor or shape, got {batch.inputs}")
        self.device = self._inputs[0].device

    def run(self, phase: Phase = lambda name: nullcontext()) -> None:
        """Run the step, gradients dropped or zero first, each part inside ``phase(its name)``."""
        self.clear()
        with phase("forward"):
            if self._accumulate:
                for parameter in self.parameters:
                    if parameter.requires_grad:
                        parameter.grad = torch.zeros_like(parameter)
            results = self._forward()
        if not any(result.requires_grad for result in results):
            raise TypeError("model must have a parameter that requires a gradient, got none")
        with phase("backward"):
            seeds = None if self._loss_fn else [torch.randn_like(result) for result in results]
            torch.autograd.backward(results, seeds)
        if self.optimizer is not None:
            with phase("optimizer"):
                self.optimizer.step()

    def run_within(self, limit: int, make_optimizer: MakeOptimizer | None) -> int | None:
        """Run the step held to ``limit`` bytes, state of an optimizer included.

        Returns the bytes at its peak, or ``None`` if it ran out of memory. On a GPU that is where
        the caching allocator would have to reserve more; what else lives there does not count.
        """
        resident = [*self.parameters, *self.model.buffers(), *self._inputs, self._buckets]
        others = 0
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            others = torch.cuda.memory_allocated(self.device) - count_bytes(resident)
        try:
            with enforce(limit + others, self.device, resident) as budget:
                self._budget = budget
                if make_optimizer is not None:
                    self.optimizer = build_optimizer(make_optimizer, self.parameters)
                    create_state(self.optimizer)
                self.run()
        except torch.OutOfMemoryError:
            return None
        if budget is not None:
            return budget.peak
        return torch.cuda.max_memory_allocated(self.device) - others

    def clear(self) -> None:
        """Drop all gradients."""
        for tensor in (*self._leaves(), *self.model.parameters()):
            tensor.grad = None

    def report(
        self,
        source: str,
        record: AllocatorRecord | LiveMeter,
        device: str,
        *,
        granularity: int = 1,
        seconds: float | None = None,
        allocated: int | None = None,
        requested: int | None = None,
    ) -> StepReport:
        """What ``record`` has seen of this step."""
        events = tuple(record.events)  # a meter logs deaths after the step, too
        grads = [leaf.grad for leaf in self._leaves() if leaf.grad is not None]
        gradients = record.storages_of(grads)
        kept = live_after_forward(events)
        static = self._static(device, granularity)
        return StepReport(
            source=source,
            device=device,
            kept=sum(size for storage, size in kept.items() if storage not in gradients),
            peak=find_peak(events, gradients, static),
            events=events,
            seconds=seconds,
            allocated=allocated,
            requested=requested,
        )

    def _leaves(self) -> list[Tensor]:
        return [*self.parameters, *self._inputs]

    def _forward(self) -> list[Tensor]:
        """What the backward pass starts from: the loss, or the output's tensors."""
        dtype = self._autocast_dtype
        with torch.autocast(self.device.type, dtype) if dtype else nullcontext():
            output = self.model(*self._batch.inputs)
            if self._loss_fn is not None:
                return [self._loss(self._loss_fn, output)]
        results = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
        if not results:
            raise TypeError(
                "loss_fn must be given where no tensor of the output requires a gradient, "
                f"got {_described(output)}"
            )
        return results

    def _loss(self, loss_fn: Loss, output: Tree) -> Tensor:
        self._target = self._batch.target_for(output)
        if self._budget is not None:
            self._budget.hold(tensors_in(self._target))
        loss = loss_fn(output) if self._target is None else loss_fn(output, self._target)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(f"loss_fn must return a scalar, got {_described(loss)}")
        return loss

    def _static(self, device: str, granularity: int) -> dict[str, int]:
        groups: dict[str, Iterable[Tensor]] = {
            "parameters": self.parameters,
            "buffers": self.model.buffers(),
            "inputs": (*self._inputs, *tensors_in(self._target)),
            "optimizer": state_of(self.optimizer, device) if self.optimizer else (),
            "buckets": (self._buckets,),
        }
        return {name: count_bytes(tensors, granularity) for name, tensors in groups.items()}


def check_step(model: nn.Module, loss_fn: Loss | None, autocast_dtype: torch.dtype | None) -> None:
    """Raise ``TypeError`` unless these can make a step; the message names the one and quotes it."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {_described(model)}")
    wrapper, shards = why_wrapper_unknown(model), why_shards_unknown(model)
    if wrapper is not None:
        raise TypeError(
            "model must be in a DistributedDataParallel of which it is known what it allocates, "
            f"got one with {wrapper}"
        )
    if shards is not None:
        raise TypeError(
            f"model must have shards of which it is known what they take, got {shards}: give it as "
            "it was before fully_shard"
        )
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of output and target, got {loss_fn!r}")
    if autocast_dtype not in (None, torch.bfloat16, torch.float16):
        raise TypeError(
            f"autocast_dtype must be torch.bfloat16 or torch.float16, got {autocast_dtype!r}"
        )


def _cross_entropy(output: Tree, target: Tree) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(
            f"loss_fn must be given where the output is no tensor, got {_described(output)}"
        )
    if not isinstance(target, Tensor):
        raise TypeError(
            "target must be a tensor, or a shape of whole numbers, where no loss_fn is given, got "
            f"{target!r}"
        )
    if target.is_floating_point() and target.shape != output.shape:
        raise TypeError(
            f"target must be class indices, or values of the output's shape {tuple(output.shape)}, "
            f"where no loss_fn is given, got {target.dtype} of shape {tuple(target.shape)}"
        )
    return F.cross_entropy(output, target)


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"an instance of {type(value).__name__}"


@contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's garbage collector, which takes a fifth of an estimate's time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def count_bytes(tensors: Iterable[Tensor], granularity: int = 1) -> int:
    """Bytes of the storages of ``tensors``, each counted once and rounded up."""
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors
    }
    return sum(-(-size // granularity) * granularity for size in storages.values())
