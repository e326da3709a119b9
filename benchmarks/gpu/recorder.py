"""Rows of measurements, each on disk the moment it exists, and the time that is left for more of them."""

import contextlib
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import groupdetr_fast as gd
from harness import commits
from harness.interleave import in_one_line
from harness.places import ROOT

__all__ = ["Recorder", "describe", "what_became"]

_PEERS = ("triton", "numpy", "scipy", "transformers", "rfdetr", "torch_linear_assignment", "torch_hungarian")
_PEERS += ("deformops", "torch_ms_deform_attn")


class Recorder:
    """Appends rows to ``<folder>/<stage>.jsonl``, one JSON object a line.

    The first row of a run has the kind ``"environment"``; the others belong to it by their field ``run``. A run that is
    cut off has lost nothing but the row that it was at.

    Attributes:
        device: where to measure.
        rehearsal: whether to do everything at tiny sizes; its times mean nothing.
        only: of what a stage measures, that in whose name this regular expression is found.
    """

    def __init__(
        self,
        folder: Path,
        stage: str,
        *,
        device: torch.device,
        minutes: float,
        rehearsal: bool = False,
        commit: str = "",
        only: str = "",
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.device = device
        self.rehearsal = rehearsal
        self.only = re.compile(only)
        self._file = folder / f"{stage}.jsonl"
        self._end = time.monotonic() + 60 * minutes
        self._run = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S")
        self._wrong = 0
        about = {"stage": stage, "rehearsal": rehearsal, "minutes": minutes, "only": only}
        self.add("environment", **about, **describe(device, commit))

    def add(self, kind: str, **fields: Any) -> None:
        """Write a row. ``status`` says what became of it: ``"ok"`` (the default), ``"wrong"`` or ``"missing"``."""
        row = {"run": self._run, "kind": kind, "status": "ok", **fields}
        self._wrong += row["status"] == "wrong"
        with self._file.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if row["status"] != "ok":
            print(
                f"{row['status']}: {json.dumps({k: v for k, v in row.items() if k not in ('run', 'status')})}",
                flush=True,
            )

    @contextlib.contextmanager
    def row(self, kind: str, **fields: Any) -> Iterator[dict[str, Any]]:
        """A row that is filled in the block and written after it.

        An error in the block makes it ``"missing"``, a failed assertion ``"wrong"``, with the reason.
        """
        row = dict(fields)
        try:
            yield row
        except Exception as error:  # any: Triton's errors, for one, are no RuntimeErrors
            row.update(what_became(error))
        self.add(kind, **row)

    @property
    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    def has_time(self, kind: str, seconds: float, **fields: Any) -> bool:
        """Whether so many seconds are left; if not, the row is written as missing for that reason."""
        if self.seconds_left >= seconds:
            return True
        self.add(
            kind, **fields, status="missing", note=f"no time: {self.seconds_left:.0f} s of {seconds:.0f} s were left"
        )
        return False

    def wants(self, name: str) -> bool:
        """Whether what has this name was asked for."""
        return self.only.search(name) is not None

    def mark_wrong(self) -> None:
        """Take into account a wrong row that another process wrote."""
        self._wrong += 1

    @property
    def found_wrong(self) -> bool:
        """Whether a row was ``"wrong"``."""
        return self._wrong > 0


def what_became(error: Exception) -> dict[str, str]:
    """Status and note of a row that an error ended: a result that is wrong, or none."""
    if isinstance(error, AssertionError):
        return {"status": "wrong", "note": in_one_line(error)}
    return {"status": "missing", "note": f"{type(error).__name__}: {in_one_line(error)}"}


def describe(device: torch.device, commit: str = "") -> dict[str, Any]:
    """What a number depends on: card or processor, versions, commit."""
    found: dict[str, Any] = {"device": platform.processor() or platform.machine()}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found = {
            "device": card.name,
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "bytes": card.total_memory,
            "l2_bytes": card.L2_cache_size,
            "cuda": torch.version.cuda,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    versions = {"python": platform.python_version(), "torch": torch.__version__, "groupdetr_fast": gd.__version__}
    for package in _PEERS:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    kernels = {op: kinds[device.type] for op, kinds in gd.ops.backends().items()}
    return {**found, "versions": versions, "commit": commit or commits.commit(), "kernels": kernels}


def _output(*command: str) -> str:
    """What a program prints; nothing if it is not there or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
