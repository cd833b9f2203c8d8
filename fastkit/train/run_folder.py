"""The folder of one run, and writing into it so that a kill or a full disk never leaves half a result."""

import errno
import json
import os
import re
import shutil
import tempfile
import uuid
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

from fastkit.errors import FastkitError
from fastkit.models import rights
from fastkit.train import processes
from fastkit.train.config import FinetuneConfig

RUN_FILE = "run.json"
STAGING = ".staging-"


def check(config: FinetuneConfig) -> None:
    """Raise FastkitError unless the output folder is free, or holds the run to be resumed. Writes nothing."""
    folder = Path(config.output)
    run_file = folder / RUN_FILE
    if folder.exists() and not folder.is_dir():
        raise FastkitError(f"output {folder} is a file: name a folder")
    if run_file.is_file():
        if not config.resume:
            raise FastkitError(f"output {folder} already holds a run: add --resume to go on with it, or name another")
        try:
            stored = json.loads(run_file.read_text())
            earlier, records = stored["config"], _records_a_step(stored["config"], stored.get("processes", 1))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise FastkitError(f"{run_file} is damaged ({error}): name another output folder") from error
        if changed := config.differences(earlier):
            was = ", ".join(f"{name} was {earlier.get(name)!r}" for name in changed)
            raise FastkitError(f"cannot resume {folder} with other settings: {was}; use the same, or another output")
        if (now := _records_a_step(config.as_dict(), processes.count())) != records:
            raise FastkitError(
                f"cannot resume {folder} with {now} records a step, which were {records}: choose --batch_size and "
                f"--accumulation so that their product, times {processes.count()} processes, is {records}"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise FastkitError(f"output {folder} is not empty and holds no run: name another folder")


def _records_a_step(config: dict, count: int) -> int:
    return config["batch_size"] * config["accumulation"] * count


def as_begun(config: FinetuneConfig, given: set[str]) -> FinetuneConfig:
    """`config`, all but its settings named in `given` as they were when the run in its output folder began."""
    try:
        earlier = json.loads((Path(config.output) / RUN_FILE).read_text())["config"]
        names = {f.name for f in fields(config)} & earlier.keys() - given - {"output", "resume", "progress"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return config  # no run yet, or a damaged one, of which `check` speaks
    if "plan" in given:
        names.discard("budget")  # it was the other plan's
    return replace(config, **{name: earlier[name] for name in names})


def finished(folder: Path, steps: int) -> tuple[dict, Path] | None:
    """(metrics.json, the folder of the adapter's weights) of a run of `steps` steps that has come to its end, or None.

    The weights are those in `adapter`, or where that is missing in the checkpoint that was exported. A run whose last
    checkpoints were taken away, and not all, has not ended: it goes on from what is left.
    """
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
        last = last_checkpoint(folder)
        behind = last is not None and _step(last) < metrics["steps"]
        done = metrics["stopped_early"] or (metrics["steps"] >= steps and not behind)
        places = [folder / "adapter", folder / f"checkpoint-{metrics['exported_step']}"]
        whole = metrics.keys() >= {"before", "after"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    found = [place for place in places if (place / "adapter_model.safetensors").is_file()]
    return (metrics, found[0]) if done and whole and found else None


def claim(config: FinetuneConfig) -> Path:
    """Make the output folder for this run, once all its inputs are known to be good. Raises as `check`."""
    check(config)
    folder = Path(config.output)
    run_file = folder / RUN_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{STAGING}*"):  # of a process that was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        if not run_file.is_file():
            write_json(run_file, {"config": config.as_dict(), "processes": processes.count()})
    except OSError as error:
        raise save_error(error, folder) from error
    return folder


def fresh(output: str | Path) -> str:
    """`output`, or the first of `output-2`, `output-3`... that does not exist: for a notebook that is run again."""
    path, n = Path(output), 1
    while path.exists():
        n += 1
        path = Path(f"{output}-{n}")
    return str(path)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; a `checkpoint-N` folder exists only once it is whole."""
    return max(
        (p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)), key=_step, default=None
    )


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


@contextmanager
def staged(target: Path):
    """Yield a folder to write into; it takes the name `target` in one rename once all of it is on the disk.

    On any error the half-written folder is removed and `target` stays as it was. A full disk becomes a FastkitError.
    Folders and files get the rights that the umask gives.
    """
    staging = None
    try:
        staging = target.parent / f"{STAGING}{uuid.uuid4().hex}"
        staging.mkdir()  # not by mkdtemp, which asks no umask
        yield staging
        rights.follow(staging)
        for path in (*staging.rglob("*"), staging):
            _sync(path)
        old = None
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=STAGING, dir=target.parent))
            target.rename(old / "old")
        staging.rename(target)
        _sync(target.parent)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        if is_disk_full(error):
            raise save_error(error, target) from error
        raise
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def staged_by_all(target: Path):
    """`staged`, for one folder into which several processes write; the first one's takes its name once all are done."""
    if processes.count() == 1:
        with staged(target) as staging:
            yield staging
        return
    if processes.is_first():
        with staged(target) as staging:
            yield Path(processes.told_by_first(str(staging)))
            processes.wait()
        processes.wait()
    else:
        staging = Path(processes.told_by_first(None))
        yield staging
        processes.wait()
        processes.wait()
        shutil.rmtree(staging, ignore_errors=True)  # on another host, which has a folder of its own


def write_json(path: Path, value) -> None:
    """Write `value` to `path` in one rename."""
    staging = path.with_name(f"{STAGING}{path.name}")  # of a fixed name: what a kill leaves is written over
    try:
        staging.write_text(json.dumps(value, indent=1) + "\n")
        staging.replace(path)
    except OSError as error:
        staging.unlink(missing_ok=True)
        raise save_error(error, path) from error


def is_disk_full(error: BaseException | None) -> bool:
    """Whether `error`, or what caused it, is a full disk: torch and safetensors wrap it in errors of their own."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(text in str(error) for text in ("No space left", "os error 28", "file write failed", "unexpected pos")):
            return True
        error = error.__cause__ or error.__context__
    return False


def save_error(error: BaseException, target: Path) -> FastkitError:
    """The FastkitError for a write into the run folder that failed."""
    if is_disk_full(error):
        where = target if target.is_dir() else target.parent
        free = shutil.disk_usage(where).free / 2**20
        last = last_checkpoint(where)
        keeps = f"the last good checkpoint is {last}" if last else "nothing was overwritten"
        return FastkitError(
            f"the disk is full ({free:.0f} MiB free) while saving {target}: {keeps}; free some space and run again "
            "with --resume"
        )
    return FastkitError(f"cannot write {target}: {error}")


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows does not open folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
