"""What a run leaves in its folder: config.json, checkpoint.pt, best.pt, log.csv and plots."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import filelock
import pandas as pd
import torch

import throughtime
from bench import plots
from bench.arguments import UsageError
from bench.train.config import Config
from bench.train.trainer import Trainer, best


class WriteError(UsageError):
    """A file cannot be written."""

    def __init__(self, path: Path, error: OSError) -> None:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        way_out = "free some space, or name" if full else "name"
        super().__init__(
            f"--out: cannot write {path}: {error.strerror or error}; {way_out} another folder"
        )


class RunFolder:
    """A folder that one process at a time writes; each file is replaced as a whole or not at all.

    Entering the context makes the folder and locks it against other processes. Without ``writes``
    it only reads: the other processes of a run that one of them stores.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.checkpoint, self._writes = path, path / "checkpoint.pt", writes
        self.kept = 0  # finished epochs in the checkpoint

    def __enter__(self) -> RunFolder:
        if not self._writes:
            return self
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"--out: wanted a folder, got the file {self.path}; name a folder")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = filelock.FileLock(self.path / "lock", timeout=0)
            self._lock.acquire()
        except filelock.Timeout:
            raise UsageError(
                f"--out: wanted a folder of its own, got {self.path}, where another run is "
                "writing; wait until it ends, or name another folder"
            ) from None
        except OSError as error:
            raise WriteError(self.path, error) from error
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writes:
            self._lock.release()

    def start(self, config: Config) -> None:
        """Begins a new run, unless the folder holds one, or a config.json of another program."""
        if self.checkpoint.exists():
            raise UsageError(
                f"--out: {self.path} already holds a run; add --resume to continue it, "
                "or name another folder"
            )
        self._stored_config()
        self._write_config(config)

    def resume(self, trainer: Trainer) -> None:
        """Brings the trainer to the last finished epoch, if that run had the same options."""
        try:
            state = torch.load(self.checkpoint, weights_only=True)
        except Exception as error:
            raise self._unusable(f"a damaged file ({type(error).__name__})") from error
        if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
            raise self._unusable("a file of another kind")
        trainer.config.check_resumes(state["config"], self.checkpoint)
        stored = self._stored_config()
        if stored is not None:
            trainer.config.check_resumes(stored, self.path / "config.json")
        try:
            trainer.load_state_dict(state)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise self._unusable(f"another state ({str(error).splitlines()[0]})") from error
        self.kept = len(trainer.history)
        self._write_config(trainer.config)
        self.write_table("log.csv", state["history"])

    def save(self, trainer: Trainer) -> None:
        """Writes the weights if they are the best so far, then checkpoint and log."""
        state, last = trainer.state_dict(), trainer.history[-1]
        if best(trainer.history) is last:
            weights = {"config": state["config"], "epoch": last.epoch, "model": state["model"]}
            self._write_state("best.pt", weights)
        self._write_state("checkpoint.pt", state)  # after best.pt, which nothing writes again
        self.kept = last.epoch
        self.write_table("log.csv", state["history"])

    def write_table(self, name: str, rows: Sequence[dict[str, Any]]) -> Path:
        table = pd.DataFrame(rows)
        return self.write(name, table.to_csv(index=False, float_format="%.6g").encode())

    def write_figure(self, stem: str, figure: Any) -> Path:
        for suffix, content in plots.rendered(figure).items():
            path = self.write(f"{stem}.{suffix}", content)
        return path

    def write(self, name: str, content: bytes | memoryview) -> Path:
        """Writes beside the file and renames: any crash leaves the old file or the new one."""
        path, temporary = self.path / name, self.path / f"{name}.tmp"
        if not self._writes:
            return path
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            if isinstance(error, OSError):
                raise WriteError(path, error) from error
            raise
        return path

    def _write_state(self, name: str, state: dict[str, Any]) -> None:
        content = io.BytesIO()
        torch.save(state, content)
        self.write(name, content.getbuffer())

    def _stored_config(self) -> dict[str, Any] | None:
        path = self.path / "config.json"
        try:
            stored = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            stored = None
        if not isinstance(stored, dict) or not {"task", "versions"} <= stored.keys():
            raise UsageError(
                f"--out: {path}: wanted the options of a training run, got a file of another kind; "
                "move it away, or name another folder"
            )
        return stored

    def _write_config(self, config: Config) -> None:
        versions = {"throughtime": throughtime.__version__, "torch": torch.__version__}
        versions["python"] = platform.python_version()
        text = json.dumps({**asdict(config), "versions": versions}, indent=2)
        self.write("config.json", f"{text}\n".encode())

    def _unusable(self, found: str) -> UsageError:
        return UsageError(
            f"--resume: {self.checkpoint}: wanted a checkpoint of this run, got {found}; "
            "start anew with another --out"
        )
