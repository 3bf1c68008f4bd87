"""``fit_``: gives each module its mode."""

from __future__ import annotations

import torch
from torch import nn

from efficient_densenet.fit.composition import Composition
from efficient_densenet.fit.estimates import Estimates
from efficient_densenet.fit.groups import AROUND_BLOCKS, Group, set_modes
from efficient_densenet.fit.report import Chosen, Mix, Uniform
from efficient_densenet.fit.search import Chain
from efficient_densenet.fit.times import Times, check_times, measured, modelled
from efficient_densenet.functional.modes import MODES, Recompute
from efficient_densenet.memory.batch import Tree, arguments_of
from efficient_densenet.memory.devices import DEVICES, check_device, room_within
from efficient_densenet.memory.optimizers import MakeOptimizer
from efficient_densenet.memory.running import Loss, check_step
from efficient_densenet.memory.sharding import has_shards
from efficient_densenet.memory.sizes import format_size

CORRECTIONS = 8
"""How often a mix is searched for again after one whose estimate was more than its composition."""


class BudgetTooSmall(ValueError):
    """No mix of modes fits the budget.

    Attributes:
        needed: bytes of the smallest budget that a mix fits.
    """

    def __init__(self, needed: int, budget: int | str | None) -> None:
        given = "what is free" if budget is None else repr(budget)
        super().__init__(
            f"budget must be at least {format_size(needed)}, the peak of the mix that needs least, "
            f"got {given}"
        )
        self.needed = needed


def fit_(
    model: nn.Module,
    inputs: Tree,
    budget: int | str | None = None,
    *,
    target: Tree = None,
    loss_fn: Loss | None = None,
    make_optimizer: MakeOptimizer | None = None,
    autocast_dtype: torch.dtype | None = None,
    accumulate: bool = False,
    device: torch.device | str | None = None,
    times: Times | None = None,
) -> Mix:
    """Give each stem, block and transition its own mode: the fastest mix that fits ``budget``.

    Sets ``recompute`` of the modules of ``model`` in place; nothing else changes. ::

        mix = fit_(model, (32, 3, 224, 224), "8GiB", target=(32,), make_optimizer=torch.optim.AdamW)
        print(mix)

    How: the step is estimated with every module in the mode that keeps least, and again with each
    module, one at a time, in each other mode. That shows where in the step, and by how much, the
    mode changes the live bytes, so the peak of any mix is known. Dynamic programming finds the
    fastest mix within the budget; it is estimated as a whole before it is set.

    Args:
        model: one whose modules recompute: from this package, or after
            :func:`~efficient_densenet.convert_`.
        inputs: the model's argument, or a tuple of its arguments, as for
            :func:`~efficient_densenet.measure`.
        budget: bytes, or a size such as ``"8GiB"``; by default the free memory of the current GPU.
        target: as for :func:`~efficient_densenet.measure`.
        loss_fn: as for :func:`~efficient_densenet.measure`.
        make_optimizer: as for :func:`~efficient_densenet.measure`.
        autocast_dtype: as for :func:`~efficient_densenet.estimate`.
        accumulate: as for :func:`~efficient_densenet.measure`.
        device: as for :func:`~efficient_densenet.estimate`.
        times: seconds of each choice, such as the ``times`` of another budget's result. By default
            copies of the modules are timed on the model's device. If that is not ``device``, or
            after ``fully_shard``, times are modelled from bytes and operations.

    Returns:
        The mode of each module, the estimated peak and the time.

    Raises:
        BudgetTooSmall: if no mix fits the budget. It is a ``ValueError``.
        ValueError: if nothing in the model recomputes, the budget is no size, or ``times`` lacks a
            choice; otherwise as :func:`~efficient_densenet.estimate`.
        TypeError: as :func:`~efficient_densenet.estimate`.
    """
    check_step(model, loss_fn, autocast_dtype)
    kind = check_device(device)
    room = room_within(budget, kind)
    options = {
        "target": target,
        "loss_fn": loss_fn,
        "make_optimizer": make_optimizer,
        "autocast_dtype": autocast_dtype,
        "accumulate": accumulate,
        "device": kind,
    }
    estimates = Estimates(model, arguments_of(inputs), options)
    groups = estimates.find_groups()
    if not groups:
        raise ValueError(
            f"model must have modules that recompute, got a {type(model).__name__} without any: "
            "convert_(model) makes its dense blocks do so"
        )
    composition = Composition.of(estimates, groups)
    found = _Found(estimates, groups, composition)
    if found.least > room:
        raise BudgetTooSmall(found.least + DEVICES[kind].reserve, budget)
    clock = "given"
    within = composition.groups_within(room)
    if times is None:
        here = {parameter.device.type for parameter in model.parameters()} == {kind}
        here = here and not has_shards(model)
        clock = "measured" if here else "modelled"
        if here:
            times = measured(within, model, autocast_dtype)
        else:
            times = modelled(within, estimates.hollow, kind, autocast_dtype)
    check_times(times, within)
    chain = composition.chain(times)
    picks = found.best(chain, room)
    set_modes(model, composition.mix(picks))
    return found.report(chain, picks, room, times, clock)


class _Found:
    """Mixes, with their peaks as estimated.

    Attributes:
        least: bytes at the peak of the mix that needs least.
    """

    def __init__(self, estimates: Estimates, groups: list[Group], composition: Composition) -> None:
        self._estimates, self._composition = estimates, composition
        self._uniform = {
            mode.name: composition.picks(_everywhere(mode.name, groups)) for mode in MODES.values()
        }
        untimed = composition.chain({})
        least = untimed.fastest(untimed.least_peak())
        assert least is not None
        self._known = [least, *self._uniform.values()]
        self.least = min(self.peak(picks) for picks in self._known)

    def peak(self, picks: tuple[int, ...]) -> int:
        """The estimated one."""
        return self._estimates.timeline(self._composition.mix(picks)).peak

    def best(self, chain: Chain, room: int) -> tuple[int, ...]:
        """The fastest choices whose estimate is within ``room``, which is not below the least."""
        fitting = [picks for picks in self._known if self.peak(picks) <= room]
        goal = room
        for _ in range(CORRECTIONS):
            picks = chain.fastest(goal)
            if picks is None:
                break
            excess = self.peak(picks) - room
            if excess <= 0:
                fitting.append(picks)
                break
            goal = chain.peak(picks) - excess
        return min(fitting, key=chain.seconds)

    def report(
        self, chain: Chain, picks: tuple[int, ...], room: int, times: Times, clock: str
    ) -> Mix:
        """What was chosen."""
        chosen = []
        for part, each, pick in zip(chain.parts, self._composition.studied, picks, strict=True):
            choice, modes = part.choices[pick], each.group.choices[pick]
            kept = choice.kept - min(other.kept for other in part.choices)
            rows = list(zip(each.group.paths, modes, strict=True))
            chosen.append(Chosen(*rows[0], kept, choice.seconds))
            chosen += [Chosen(path, mode, 0, 0.0) for path, mode in rows[1:]]
        return Mix(
            room=room,
            peak=self.peak(picks),
            least=self.least,
            chosen=tuple(chosen),
            uniform={
                mode: Uniform(self.peak(each), chain.seconds(each))
                for mode, each in self._uniform.items()
            },
            times=times,
            clock=clock,
        )


def _everywhere(mode: Recompute, groups: list[Group]) -> dict[str, Recompute]:
    mix: dict[str, Recompute] = {}
    for group in groups:
        around = mode if mode in AROUND_BLOCKS else AROUND_BLOCKS[-1]
        named = [
            mode if any(modes[i] == mode for modes in group.choices) else around
            for i in range(len(group.paths))
        ]
        mix |= group.mix(tuple(named))
    return mix
