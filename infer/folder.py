"""The folder of results of a job: which job it holds, and that no other writes into it unasked.

`job.json` says which command the folder belongs to. The same command goes on where it stopped, in any number of
processes at once; another one is refused. It also holds the number from which fresh seeds follow.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import itertools
import json
import os
import re
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infer.checks import FRESH
from infer.leftovers import temporary_name
from infer.manifest import manifest_files, read_records
from infer.png import write_whole
from infer.rows import Row
from infer.sheets import sheets_in
from infer.tables import STDIN, stdin
from jaxmix import paths
from jaxmix.command import command_words
from jaxmix.types import InputError

OWN = ("job.json", "manifest.jsonl", "gallery.html", "contact_sheet.png")
INPUTS = ("layout", "reference", "content", "style")
"""What methods call the pictures that they write beside a result."""
NOT_PICTURES = ("out", "resume", "overwrite", "strict", "dry_run", "batch_size", "devices")
NOT_PICTURES += ("distributed", "worker", "workers", "engine", "resources")
"""Flags on which no picture depends: a job is the same with others."""


def digest(held: Any) -> str:
    """Return 8 hexadecimal digits that stand for what JSON can hold."""
    text = json.dumps(held, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def job_of(config: Any, wanted: str = "") -> str:
    """Return what identifies the job of some flags: all of them on which pictures depend, and the command's method."""
    held = {key: value for key, value in dataclasses.asdict(config).items() if key not in NOT_PICTURES}
    files = ("image", "mask") if held["prompts"] == STDIN else ("image", "mask", "prompts")
    if held["prompts"] == STDIN:
        held["prompts"] = hashlib.sha256(stdin()).hexdigest()
    for key in files:
        if held[key] not in (None, "builtin") and paths.url_of(held[key]) is None:
            held[key] = str(Path(held[key]).resolve())
    return digest({"method": wanted, **held})


class Folder:
    """The folder of a job. It is found, and refused if it holds another job, when it is made; `claim` writes to it."""

    def __init__(self, config: Any, wanted: str = "", identity: Sequence[Any] | None = None) -> None:
        self.job = job_of(config, wanted)
        self._config = config
        self._claimed = False
        self._fresh = secrets.randbits(64)
        if identity is not None:
            self.path = paths.place(identity[0])
            self.follow(identity)
            return
        if config.out is not None:
            _check_place(config.out)
        self.path = paths.place(config.out) if config.out is not None else self._numbered()
        if paths.remote(self.path):
            try:
                paths.check_folder(self.path, writes=not config.dry_run)
            except InputError as error:
                raise InputError(f"--out: {error}") from None
        held = _read(self.path)
        named = not paths.remote(self.path) and (self.path / "job.json").exists()  # damaged, maybe
        there = held is not None or named or next(manifest_files(self.path), None) is not None
        if there and not config.overwrite and not config.resume and (held or {}).get("job") != self.job:
            raise InputError(
                f"--out {self.path}: found the pictures of another job there"
                + (f" ({held['command']})" if held is not None and held.get("command") else "")
                + ", expected --overwrite to replace them, --resume to keep those that this job would draw, too, or "
                "another folder"
            )
        if held is not None and not config.overwrite:
            self._fresh = held["fresh"]

    def claim(self) -> None:
        """Make the folder, and write down there whose it is; with --overwrite, remove what it held."""
        if self._claimed:
            return
        self._claimed = True
        if self._config.out is None and not self._config.resume:
            self.path = self._made()
        if not paths.remote(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        if self._config.overwrite:
            self._clear()
        held = _read(self.path)
        if held is not None and held["job"] != self.job and not self._config.resume:
            raise self._taken()
        if held is None or held["job"] != self.job:
            self._write(replace=held is not None)
        else:  # as this process found it, or as another has made it since
            self._fresh = held["fresh"]

    @property
    def identity(self) -> tuple[str, int]:
        """The folder's name and the number from which fresh seeds follow: what processes of one job share."""
        return str(self.path), self._fresh

    def follow(self, identity: Sequence[Any]) -> None:
        """Take the folder of another process of this job, which has claimed it."""
        if self._config.out is None:
            self.path = paths.place(identity[0])
        self._fresh, self._claimed = identity[1], True

    def check_seen(self, seconds: float = 30.0) -> None:
        """Raise InputError if what another process has written here cannot be seen, after so many seconds."""
        until = time.monotonic() + seconds
        while (_read(self.path) or {}).get("fresh") != self._fresh:
            if time.monotonic() > until:
                raise InputError(
                    f"--out {self.path}: found nothing of what process 0 has written there, expected a folder that all "
                    "hosts share"
                )
            time.sleep(0.2)

    def again(self) -> str:
        """Return the command that goes on with this folder."""
        words = command_words(drop=("overwrite", "resume"))
        if self._config.overwrite and any(word.startswith("--config") for word in words):
            words.append("--overwrite=false")
        named = self._config.out is not None
        return " ".join(words if named else [*words, "--out", str(self.path)]) or "the same command"

    def seeded(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows, those that asked for a fresh seed with one: the same whenever this job goes on."""
        shared = self._config.out is not None and not self._config.overwrite and not self._config.dry_run
        if shared and any(row.seed == FRESH for row in rows):
            self.claim()  # another process of this job must not draw others
        return [dataclasses.replace(row, seed=self._seed(row.origin)) if row.seed == FRESH else row for row in rows]

    def _seed(self, number: int) -> int:
        made = hashlib.sha256(f"{self._fresh} {number}".encode()).digest()
        return int.from_bytes(made[:4], "big")  # 32 bits, which every other tool can draw with, too

    def _numbered(self) -> Path:
        """Return the first of gallery, gallery-2, ... that is not there, or the last of this job to go on with."""
        names = (Path("gallery" if number == 1 else f"gallery-{number}") for number in itertools.count(1))
        if not self._config.resume:
            return next(path for path in names if not os.path.lexists(path))
        mine = [path for path in itertools.takewhile(Path.exists, names) if (_read(path) or {}).get("job") == self.job]
        if not mine:
            raise InputError("--resume: found no folder gallery, gallery-2, ... of this command, expected --out FOLDER")
        return mine[-1]

    def _made(self) -> Path:
        """Make the first numbered folder that no other process has made meanwhile."""
        while True:
            path = self._numbered()
            try:
                path.mkdir()
                return path
            except FileExistsError:
                continue

    def _write(self, replace: bool) -> None:
        """Write job.json; of several processes that do so at once one succeeds, and all take what it has written."""
        began = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        held = {"job": self.job, "fresh": self._fresh, "command": " ".join(command_words()), "began": began}
        content = json.dumps(held) + "\n"
        path = self.path / "job.json"
        if paths.remote(path):
            try:
                paths.write(path, content.encode(), create=not replace)
            except FileExistsError:
                self._follow(content.encode())
            return
        if replace or not hasattr(os, "link"):
            write_whole(path, content.encode())
            return
        temporary = self.path / temporary_name("job")
        write_whole(temporary, content.encode())
        try:
            os.link(temporary, path)
        except FileExistsError:
            self._follow(content.encode())
        except OSError:  # a file system without links
            write_whole(path, content.encode())
        finally:
            temporary.unlink(missing_ok=True)

    def _follow(self, content: bytes) -> None:
        """Take what another process of this job has written meanwhile; raises InputError if it is another job's."""
        other = _read(self.path)
        if other is not None and other["job"] != self.job:
            raise self._taken() from None
        if other is None:  # damaged
            write_whole(self.path / "job.json", content)
        else:
            self._fresh = other["fresh"]

    def _taken(self) -> InputError:
        return InputError(f"--out {self.path}: another job has just begun there, expected another folder")

    def _clear(self) -> None:
        """Remove what earlier jobs wrote here, and nothing else."""
        names = {record["file"] for record in read_records(self.path) if "file" in record}
        names |= {*sheets_in(self.path, paths.names(self.path))}
        stems = {Path(name).stem for name in names}

        def ours(path: Path) -> bool:
            stem, _, kind = path.stem.rpartition("_")
            beside = path.suffix == ".png" and stem in stems and kind in INPUTS
            return path.name in names or path.name in OWN or beside

        if paths.remote(self.path):
            there = [self.path / name for name in paths.names(self.path)]
            paths.remove_all([*(path for path in there if ours(path)), *manifest_files(self.path)])
            return
        for path in list(self.path.iterdir()):
            if ours(path):
                path.unlink(missing_ok=True)
        for path in manifest_files(self.path):
            path.unlink(missing_ok=True)


def _read(folder: Path) -> dict[str, Any] | None:
    """Return what job.json holds, None if it is missing or damaged."""
    there = paths.read(folder / "job.json") if paths.remote(folder) else None
    if paths.remote(folder) and there is None:
        return None
    try:
        content = (folder / "job.json").read_bytes() if there is None else there
        held = json.loads(content.decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    good = isinstance(held, dict) and isinstance(held.get("job"), str) and type(held.get("fresh")) is int
    return held if good and isinstance(held.get("command", ""), str) else None


def _check_place(out: str) -> None:
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", out)
    if found and (paths.url_of(out) is None or "://" not in out):
        raise InputError(
            f"--out: found {out!r}, expected a folder here, or in a bucket: gs://BUCKET/... or s3://BUCKET/..."
        )
    if found:
        return
    if not out.strip() or "\x00" in out:
        raise InputError(f"--out: found {out!r}, expected the name of a folder")
    if Path(out).exists() and not Path(out).is_dir():
        raise InputError(f"--out: found {out!r}, which is a file, expected a folder")
