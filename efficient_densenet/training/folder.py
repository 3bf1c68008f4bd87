"""The folder of a run: opened for a new run or to resume one, restored if no step was taken."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from efficient_densenet.training.config import ConfigError, TrainConfig

CHECKPOINT = "last.ckpt"
CONFIG = "config.json"
FIRST_FILES = (CONFIG, "hparams.yaml", "metrics.csv")
"""What a run writes before it has trained anything."""


class RunFolder:
    """Where a run leaves its files.

    Args:
        out: the folder, which need not exist.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._missing = [folder for folder in (out, *out.parents) if not folder.exists()]
        self._is_new = not self.checkpoint.exists()

    @property
    def checkpoint(self) -> Path:
        """The checkpoint of the last finished epoch, which need not exist."""
        return self.out / CHECKPOINT

    def chosen(self) -> dict[str, object] | None:
        """The modes of the run to resume; ``None`` if there is none.

        Raises:
            ConfigError: if its configuration is damaged.
        """
        if self._is_new:
            return None
        earlier = self._read_config()
        return {name: earlier[name] for name in ("recompute", "mix") if name in earlier}

    def open(self, config: TrainConfig, resume: bool) -> None:
        """Write the configuration, or check that the run to resume has the same.

        Only ``epochs`` may differ, and be more.

        Raises:
            ConfigError: if the folder cannot take the run.
        """
        if not self._is_new:
            if not resume:
                raise ConfigError(
                    "out", f"{str(self.out)!r} holds a run: resume it, or name another folder"
                )
            self._compare(config, self._read_config())
            self._check_checkpoint()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            content = json.dumps(asdict(config), indent=2) + "\n"
            (self.out / CONFIG).write_text(content, encoding="utf-8")
        except OSError as error:
            raise ConfigError("out", f"{str(self.out)!r} cannot hold a run: {error}") from error

    def discard(self) -> None:
        """Remove the files and folders of a new run that took no step."""
        if not self._is_new or self.checkpoint.exists():
            return
        for name in FIRST_FILES:
            (self.out / name).unlink(missing_ok=True)
        for folder in self._missing:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()

    def _read_config(self) -> dict[str, object]:
        path = self.out / CONFIG
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(earlier, dict):
                raise ValueError(f"it holds {earlier!r}")
        except (OSError, ValueError) as error:
            raise ConfigError(
                "out",
                f"holds a run to resume whose {str(path)!r} is damaged ({_first_line(error)}): "
                f"restore it from hparams.yaml beside it, or remove {CHECKPOINT} to start again",
            ) from error
        return earlier

    def _compare(self, config: TrainConfig, earlier: dict[str, object]) -> None:
        for name, value in asdict(config).items():
            before = earlier.get(name)
            longer = name == "epochs" and isinstance(before, int) and value > before
            if value != before and not longer:
                raise ConfigError(
                    name, f"is {before} in the run to resume in {str(self.out)!r}, not {value}"
                )

    def _check_checkpoint(self) -> None:
        try:
            found = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            if missing := {"state_dict", "optimizer_states", "history"} - set(found):
                raise ValueError(f"it has no {', '.join(sorted(missing))}")
        except Exception as error:  # what a damaged file raises depends on where the damage is
            raise ConfigError(
                "out",
                f"holds a run to resume whose {str(self.checkpoint)!r} is damaged "
                f"({_first_line(error)}): put a copy in its place, or remove it to start again",
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
