"""What fits a budget: the largest batch of a named network, or the deepest network for a batch.

Nothing is computed: every step is estimated from shapes (:func:`efficient_densenet.estimate`),
optimizer state included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from efficient_densenet.fit.fitting import BudgetTooSmall, fit_
from efficient_densenet.fit.groups import modes_of
from efficient_densenet.functional.modes import MODES
from efficient_densenet.memory.devices import DEVICES, present_device
from efficient_densenet.memory.plan import Fit
from efficient_densenet.memory.sizes import format_size
from efficient_densenet.training.any_model import MODEL_MODES, ModelWork, parse_shape
from efficient_densenet.training.config import (
    PRECISIONS,
    RECIPES,
    SMALLEST_BATCH,
    ConfigError,
    TrainConfig,
    check_at_least,
    check_budget,
    check_choice,
    check_network,
)
from efficient_densenet.training.work import COMPETITORS, Work

Varies = Literal["batch", "depth"]

TRAIN_IMAGES = 60_000  # of Fashion-MNIST


@dataclass(frozen=True)
class Plan:
    """What fits a budget on a kind of device. ``print`` shows it as a table.

    ``plan[mode]`` is ``plan.fits[mode]``.

    Attributes:
        budget: bytes of the budget.
        device: ``"cpu"`` or ``"cuda"``.
        reserve: bytes of the budget that are set aside for what the estimate cannot see.
        reserve_reason: what they are for.
        varies: what was searched: ``"batch"`` or ``"depth"``; ``work`` fixes the other.
        work: the training step that was planned.
        fits: for each mode the largest size that fits, as a
            :class:`~efficient_densenet.memory.plan.Fit`.
    """

    budget: int
    device: str
    reserve: int
    reserve_reason: str
    varies: Varies
    work: Work | ModelWork
    fits: dict[str, Fit]

    def __getitem__(self, mode: str) -> Fit:
        return self.fits[mode]

    @property
    def subject(self) -> str:
        """What is trained, in one line."""
        return self.work.subject(self.varies == "depth")

    @property
    def title(self) -> str:
        """What is trained and the budget, in one line."""
        return f"{self.subject} in {format_size(self.budget)}"

    def __str__(self) -> str:
        rows = [("mode", f"largest {self.varies}", "peak", "one size up", "its peak")]
        rows += [(mode, *_cells(fit)) for mode, fit in self.fits.items()]
        reserve = f"{format_size(self.reserve)} ({self.reserve_reason})"
        return "\n".join(
            [
                self.title,
                *_format_table(rows),
                f"Peaks are estimated. Reserve on {self.device}: {reserve}.",
            ]
        )


def _cells(fit: Fit) -> tuple[str, str, str, str]:
    largest, peak = (str(fit.largest), format_size(fit.peak)) if fit.largest else ("none fits", "")
    if fit.next is None:
        return largest, peak, "", ""
    return largest, peak, str(fit.next), format_size(fit.next_peak or 0)


def _format_table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table whose first column is flush left and whose others are flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join([first.ljust(widths[0]), *cells]).rstrip()


def plan(
    budget: int | str | None = None,
    *,
    model: str = "cifar-bc",
    image_size: int | None = None,
    batch_size: int | None = None,
    depth: int | None = None,
    growth_rate: int | None = None,
    in_channels: int = 3,
    num_classes: int = 10,
    drop_rate: float = 0.0,
    precision: str = "32-true",
    device: str | None = None,
    modes: Iterable[str] = tuple(COMPETITORS),
) -> Plan:
    """The largest batch of a network, or the deepest ``cifar-bc`` for a batch size, in each mode.

    A step is forward, cross-entropy, backward and SGD with momentum. It fits if its estimated peak,
    together with the device's reserve, is within the budget; parameters, their gradients, optimizer
    state and the batch are part of the peak. For any other model:
    :func:`~efficient_densenet.largest_batch`.

    Args:
        budget: bytes, or a size such as ``"8GiB"``; by default the free memory of the current GPU.
        model: ``"cifar-bc"``, ``"fashion"``, or ``"densenet121"``, ``161``, ``169``, ``201`` or
            ``264``.
        image_size: pixels, height and width; by default the model's training size.
        batch_size: if given, the depth is searched for this batch size; only for ``cifar-bc``.
        depth: depth of ``cifar-bc``, ``6 * n + 4``; by default 100.
        growth_rate: channels ``k`` of ``cifar-bc``; by default 12.
        in_channels: channels of an image.
        num_classes: number of logits.
        drop_rate: dropout probability after each layer.
        precision: ``"32-true"``, ``"bf16-mixed"``, ``"16-mixed"`` or ``"64-true"``.
        device: ``"cpu"`` or ``"cuda"``: where the step would run; by default as on this machine.
        modes: some of ``"naive"``, ``"checkpointed"`` (as torchvision's ``memory_efficient=True``),
            ``"norm"`` and ``"bottleneck"``; by default all.

    Returns:
        The largest size in each mode, and its peak.

    Raises:
        ConfigError: if an argument is out of range; the message names and quotes it. It is a
            ``ValueError``.
    """
    device = device or present_device()
    check_choice("device", device, DEVICES)
    check_choice("precision", precision, PRECISIONS)
    check_choice("model", model, RECIPES)
    for mode in (modes := tuple(modes)):
        check_choice("modes", mode, COMPETITORS)
    if batch_size is not None and (model != "cifar-bc" or depth is not None):
        raise ConfigError(
            "batch_size",
            f"{batch_size} asks for the deepest cifar-bc, and a depth or another model for the "
            "largest batch: leave out one of them",
        )
    if model == "cifar-bc":
        growth_rate = 12 if growth_rate is None else growth_rate
        depth = 100 if depth is None else depth
    image_size = RECIPES[model].image_size if image_size is None else image_size
    check_network(model, depth, growth_rate, image_size)
    check_at_least("batch_size", batch_size, SMALLEST_BATCH)
    check_at_least("in_channels", in_channels, 1)
    check_at_least("num_classes", num_classes, 2)
    work = Work(
        model,
        image_size,
        batch_size or SMALLEST_BATCH,
        depth,
        growth_rate,
        in_channels,
        num_classes,
        drop_rate,
        precision,
    )
    work.check()
    varies: Varies = "depth" if batch_size else "batch"
    return plan_work(work, varies, check_budget(budget), device, modes)


def plan_work(
    work: Work,
    varies: Varies,
    budget: int,
    device: str,
    modes: Iterable[str] = tuple(COMPETITORS),
) -> Plan:
    """As :func:`plan`, for ``work`` that was checked."""
    counts = DEVICES[device]
    find = work.largest_batch if varies == "batch" else work.greatest_depth
    fits = {mode: find(mode, budget, device) for mode in modes}
    return Plan(budget, device, counts.reserve, counts.reserve_reason, varies, work, fits)


def plan_model(
    model: str, shape: str | None, budget: str | None, precision: str, device: str | None
) -> Plan:
    """The largest batch of a model that ``package.module:function`` makes, naive and converted.

    Args:
        model: names the function.
        shape: of one image, such as ``"1,96,96,96"``.
        budget: as for :func:`plan`.
        precision: as in training.
        device: as for :func:`plan`.

    Raises:
        ConfigError: if an argument is out of its range, or the model does not take the images.
    """
    kind, counts = device or present_device(), DEVICES[device or present_device()]
    size, work = check_budget(budget), ModelWork(model, parse_shape(shape), precision)
    fits = {mode: work.largest_batch(mode, size, kind) for mode in MODEL_MODES}
    return Plan(size, kind, counts.reserve, counts.reserve_reason, "batch", work, fits)


def config_within(
    budget: str, options: dict[str, Any], chosen: dict[str, Any] | None = None
) -> TrainConfig:
    """The training run of ``options`` whose step fits ``budget`` on this machine.

    Chooses the fastest mix of modes that fits, which needs some steps' time; if ``recompute`` is
    given, the largest batch up to the training set's size; if the batch is given too, nothing.

    Args:
        budget: a size such as ``"8GiB"``.
        options: as for :meth:`TrainConfig.of`, ``None`` where not given.
        chosen: the ``recompute`` and ``mix`` of an earlier choice, to be taken again.

    Raises:
        ConfigError: if nothing fits, or as :meth:`TrainConfig.of`.
    """
    size = check_budget(budget)
    config = TrainConfig.of(**{**options, "budget": size})
    if options.get("recompute") and options.get("batch_size"):
        return config
    try:
        if options.get("recompute"):
            return replace(config, batch_size=_largest_batch(config, size))
        return replace(config, **(chosen or _fastest(config, size)))
    except _NothingFits as error:
        raise ConfigError("budget", f"{budget} is too small: {error}") from error


class _NothingFits(Exception):
    pass


def _fastest(config: TrainConfig, budget: int) -> dict[str, Any]:
    """``recompute`` and ``mix`` of the fastest mix."""
    device, work = present_device(), Work.of(config)
    network = config.build_model().to(device)
    if config.precision == "64-true":
        network = network.double()
    try:
        fit_(network, work.images, budget, target=work.labels, device=device, **work.step)
    except BudgetTooSmall as error:
        raise _NothingFits(
            f"a batch of {config.batch_size} needs {format_size(error.needed)} in the mix of modes "
            "that needs least"
        ) from error
    modes = modes_of(network)
    most = Counter(modes.values()).most_common(1)[0][0]
    return {
        "recompute": most,
        "mix": {path: mode for path, mode in modes.items() if mode != most},
    }


def _largest_batch(config: TrainConfig, budget: int) -> int:
    mode = MODES[config.recompute].label
    fit = plan_work(Work.of(config), "batch", budget, present_device(), [mode])[mode]
    if not fit.largest:
        raise _NothingFits(
            f"recompute {config.recompute!r} needs {format_size(fit.next_peak or 0)} "
            f"for a batch of {fit.next}"
        )
    return min(fit.largest, config.train_size or TRAIN_IMAGES)
