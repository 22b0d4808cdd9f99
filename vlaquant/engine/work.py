"""The work directory: what a run has finished, so that it can be killed at any moment and go on.

    .NAME.work/
        identity.json            what the run depends on; another identity is refused
        stage-0003.safetensors   the tensors of a finished unit, as they will be written
        stage-0003.json          its records; a stage counts as finished when this file is there
        chain-0003/rank-0/       outputs of finished units that later stages read, after stage 3, of one process

Every file takes its name only when it is complete and on the disk. Of several processes the main one writes, but for
the outputs of finished units.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vlaquant.checkpoint import (
    TensorFiles,
    read_manifest,
    source_identity,
    sync_directory,
    write_json,
    write_tensor_file,
)
from vlaquant.checkpoint.json_files import read_json
from vlaquant.engine.fingerprint import digest, fingerprint, first_difference
from vlaquant.engine.processes import ALONE, Processes
from vlaquant.errors import CheckpointError, ExportError

_IDENTITY = "identity.json"

#: Log of the run, which goes beside the output in the end.
LOG = "log.jsonl"

#: Folder for activations beyond the memory limit; its content is of no use to a later run.
SPILL = "spill"


@dataclass(frozen=True, slots=True, eq=False)
class Finished:
    """Where the tensors of a finished unit are, and their digests as they were in memory."""

    files: TensorFiles
    digests: dict[str, str]


def write_finished(path: Path, tensors: Mapping[str, Tensor]) -> Finished:
    """Write tensors that belong to no stage, and open them.

    Raises:
        ExportError: the disk is full.
    """
    try:
        write_tensor_file(path, tensors)
    except OSError as error:
        raise ExportError(f"{path}: could not be written: {error}; make room and go on with --resume") from error
    return Finished(TensorFiles.open([path]), {name: digest(tensor) for name, tensor in tensors.items()})


def work_path(output: Path) -> Path:
    """Where the work directory of an output lies: beside it."""
    return output.parent / f".{output.name}.work"


def finished_run(
    output: Path, source: str | Path, recipe: Mapping[str, Any], samples: Iterable[Any] | None
) -> dict[str, Any] | None:
    """The manifest of an output whose run was killed after writing it, with nothing left to do but to tidy up.

    The output has to be that of the very run whose work directory lies beside it, and that run the one that is asked
    for now. The work directory is deleted.

    Args:
        output: the directory that the run wrote.
        source: the float checkpoint.
        recipe: as it is now, resolved.
        samples: given in place of what the recipe names; None if none are.
    """
    identity = work_path(output) / _IDENTITY
    if not identity.is_file() or not output.is_dir():
        return None
    try:
        manifest, run = read_manifest(output), read_json(identity)
    except CheckpointError:
        return None
    same = (
        manifest["plan"] == run["plan"]
        and manifest["versions"] == run["versions"]
        and manifest["source_sha256"].items() <= run["source_sha256"].items()
        and run["recipe"].items() <= manifest["recipe"].items()
        and run["recipe"].items() <= json.loads(json.dumps(recipe)).items()
    )
    if not same or (samples is not None and (run["samples"] or {}).get("sha256") != fingerprint(samples)):
        return None
    if source_identity(Path(source), also=run["source_sha256"]) != run["source_sha256"]:
        return None
    shutil.rmtree(work_path(output), ignore_errors=True)
    return manifest


class WorkDirectory:
    """The finished stages of one run.

    Attributes:
        path: the directory.
        records: of the finished stages, in order.
    """

    def __init__(self, path: Path, records: list[dict[str, Any]], processes: Processes) -> None:
        self.path = path
        self.records = records
        self._processes = processes

    @classmethod
    def open(
        cls,
        output: Path,
        identity: Mapping[str, Any],
        *,
        resume: bool,
        overwrite: bool,
        processes: Processes = ALONE,
    ) -> "WorkDirectory":
        """Begin a run, or go on with an unfinished one.

        Args:
            output: the directory that the run will write.
            identity: what the run depends on, as plain JSON values.
            resume: go on where an earlier run was stopped; with nothing to go on with, begin.
            overwrite: throw an unfinished run away.
            processes: that use the directory together.

        Raises:
            ExportError: there is an unfinished run and neither was asked for, or it was another run.
        """
        path = work_path(output)
        try:
            if processes.main:
                cls._prepare(path, output, identity, resume=resume, overwrite=overwrite)
            processes.barrier()
            work = cls(path, [], processes)
            work._read()
        except (CheckpointError, FileNotFoundError) as error:
            raise ExportError(
                f"{output}: the unfinished run in {path.name} is damaged: {error}. Throw it away (--overwrite without "
                "--resume)"
            ) from error
        if processes.main:
            work._sweep()
        processes.barrier()
        return work

    @staticmethod
    def _prepare(path: Path, output: Path, identity: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        """A directory that belongs to this run, empty or as it was left."""
        identity = json.loads(json.dumps(identity))
        if path.exists() and overwrite and not resume:
            shutil.rmtree(path)
        if path.exists() and not resume:
            raise ExportError(
                f"{output}: a run that was not finished lies in {path.name}; go on with it (--resume), or throw it "
                "away (--overwrite)"
            )
        if (path / _IDENTITY).is_file():
            earlier = read_json(path / _IDENTITY)
            difference = first_difference(identity, earlier)
            if difference is not None:
                raise ExportError(
                    f"{output}: the unfinished run in {path.name} was another one: {difference}. Make it the same "
                    "again, or throw the unfinished run away (--overwrite without --resume)"
                )
        else:
            _begin(path, identity)

    def _read(self) -> None:
        """Take over the finished stages, and make sure that all their files are whole."""
        while (record := self.path / f"stage-{len(self.records):04d}.json").is_file():
            self.records.append(read_json(record))
            TensorFiles.open([self.stage_file(len(self.records) - 1)]).close()
        if not self.records or read_json(self.path / _IDENTITY)["samples"] is None:
            return
        if self.chain is None:
            raise CheckpointError(f"{self._chain(len(self.records) - 1)}: no such directory")
        for file in self.chain.glob("*.safetensors"):
            TensorFiles.open([file]).close()
        read_json(self.chain / "outputs.json")

    @property
    def chain(self) -> Path | None:
        """Where this process has the outputs after the last finished stage; None if none are needed."""
        path = self._chain(len(self.records) - 1) / self._mine
        return path if path.is_dir() else None

    @property
    def spill(self) -> Path:
        """Where this process may put activations that its memory has no room for."""
        return self.path / SPILL / self._mine

    def new_chain(self) -> Path:
        """An empty directory for this process' outputs after the next stage; :meth:`commit` makes it count."""
        path = self._chain(len(self.records)) / self._mine
        shutil.rmtree(path, ignore_errors=True)
        try:
            path.mkdir(parents=True)
        except OSError as error:
            raise ExportError(f"{path}: could not be made: {error}; make room and go on with --resume") from error
        return path

    def stage_file(self, index: int) -> Path:
        """The tensors of a finished stage."""
        return self.path / f"stage-{index:04d}.safetensors"

    def commit(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """The next stage is finished: from here on it survives. Waits for all processes, of which the main one writes.

        Raises:
            ExportError: the disk is full; the stages before are kept.
        """
        self._processes.barrier()
        if self._processes.main:
            self._write(tensors, record)
        self.records.append(json.loads(json.dumps(record)))
        if self._processes.main:
            self._sweep()
        self._processes.barrier()

    def _write(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        index = len(self.records)
        try:
            write_tensor_file(self.stage_file(index), tensors)
            sync_directory(self.path)
            temporary = self.path / f"stage-{index:04d}.json.partial"
            write_json(temporary, record)
            sync_directory(self.path)
            temporary.replace(self.path / f"stage-{index:04d}.json")
            sync_directory(self.path)
        except OSError as error:
            raise ExportError(
                f"{self.path}: stage {index} could not be written: {error}. Finished stages are kept; make room and "
                "go on with --resume"
            ) from error

    def save_log(self, path: Path) -> None:
        """Move the log out of the directory."""
        shutil.move(self.path / LOG, path)

    def remove(self) -> None:
        """Delete everything: the run is complete, or nothing of it is worth keeping."""
        shutil.rmtree(self.path, ignore_errors=True)

    @property
    def _mine(self) -> str:
        return f"rank-{self._processes.rank}"

    def _chain(self, index: int) -> Path:
        return self.path / f"chain-{index:04d}"

    def _sweep(self) -> None:
        """Delete what belongs to no finished stage, and chains that nothing reads any more."""
        finished = {
            f"stage-{index:04d}.{kind}" for index in range(len(self.records)) for kind in ("safetensors", "json")
        }
        keep = finished | {_IDENTITY, LOG, SPILL, self._chain(len(self.records) - 1).name}
        for path in self.path.iterdir():
            if path.name in keep:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _begin(path: Path, identity: Mapping[str, Any]) -> None:
    try:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        temporary = path / f"{_IDENTITY}.partial"
        write_json(temporary, identity)
        sync_directory(path)
        os.replace(temporary, path / _IDENTITY)
        sync_directory(path)
    except OSError as error:
        shutil.rmtree(path, ignore_errors=True)
        raise ExportError(f"{path}: could not be written: {error}") from error
