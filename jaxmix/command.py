"""What all commands share: flags from a dataclass, one-line errors, progress, the compile cache."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import inspect
import io
import json
import os
import re
import shlex
import sys
import time
import typing
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jaxmix.copies import named
from jaxmix.types import CheckpointWarning, InputError, shown

_BOOLEANS = ("true", "false", "yes", "no")
_NOTHING = ("null", "none")
_OWN_KEYS = ("config", "print_config", "help", "version")
PROGRAM: list[str] = []
"""How the user calls the command, if not as ``python -m MODULE``: ``["jaxmix", "generate"]``."""
_given: list[str] = []


def running() -> bool:
    """Return whether this process runs one of our commands, which show their own progress."""
    return bool(_given)


def run(main: Callable[[Any], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Parse the command line into main's config dataclass, call main, and exit with its status.

    `main` takes one argument annotated with a dataclass; every field is a flag (`--batch-size` and `--batch_size`
    both work, nested dataclasses are `--a.b`) and a key of the YAML file given as `--config FILE.yaml`. Flags override
    the file, wherever they come. A user's mistake (InputError, an unreadable path) becomes one `error:` line on stderr
    and status 2; Ctrl-C becomes status 130.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may hold what no encoding can say
    argv = sys.argv[1:] if argv is None else argv
    _given[:] = [*_program_name(main).split(), *argv]
    warnings.showwarning = _show_warning
    try:
        status = main(parse(main, argv))
    except InputError as error:
        print(f"error: {named(error)}", file=sys.stderr)
        status = 2
    except OSError as error:
        if error.filename is None and error.errno not in _FULL:
            raise  # not a path the user named: a traceback says more
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status or 0)


_show_as_python_does = warnings.showwarning


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **rest: Any) -> None:
    """Show what a checkpoint made us leave out or replace as one line, and other warnings as Python does."""
    if issubclass(category, CheckpointWarning):
        print(f"note: {named(message)}", file=sys.stderr)
    else:
        _show_as_python_does(message, category, *where, **rest)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # from a write, which does not say to what


def command_words(drop: Sequence[str] = ()) -> list[str]:
    """Return the words of the command that `run` runs, quoted for a shell, without the switches named in ``drop``."""
    words, out = list(_given), []
    while words:
        word = words.pop(0)
        name, equals, _ = word.removeprefix("--").partition("=")
        if word.startswith("--") and name.replace("-", "_") in drop:
            if not equals and words and words[0].lower() in _BOOLEANS:
                words.pop(0)
            continue
        out.append(shlex.quote(word))
    return out


def parse(main: Callable[[Any], int | None], argv: Sequence[str]) -> Any:
    """Return main's config dataclass filled from `argv`; raises InputError with one line on the first mistake."""
    import jsonargparse

    config_type = _config_type(main)
    # The type of an inherited field must be resolved in the module that defines it; jsonargparse would look in the
    # subclass's module, and treat what it cannot find there as untyped (the text "no" would then be false).
    vars(config_type)["__init__"].__annotations__.update(typing.get_type_hints(config_type))
    # Field help may stand in the class docstring (Attributes:) or as a string under each field.
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=_program_name(main),
        description=(inspect.getdoc(inspect.getmodule(main)) or "").split("\n\n")[0],
        exit_on_error=False,
        version=version(),
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below; flags override it.")
    parser.add_class_arguments(config_type, nested_key=None, fail_untyped=True)
    known = {action.dest for action in parser._actions}.difference(_OWN_KEYS)
    hints = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    switches = {name for name, hint in hints.items() if hint is bool or bool in typing.get_args(hint)}
    lists = {name: hint for name, hint in hints.items() if _is_list(hint)}
    whole = {name for name, hint in hints.items() if hint is int or int in typing.get_args(hint)}
    arguments, files = _normalise(argv, known, switches, lists, getattr(config_type, "aliases", {}), whole)
    for file in files:
        _check_file(file, known)
    try:
        namespace = parser.parse_args([*(f"--config={file}" for file in files), *arguments])
    except (jsonargparse.ArgumentError, TypeError) as error:
        raise InputError(_one_line(str(error)) + (f" (flags and {', '.join(files)})" if files else "")) from None
    filled = parser.instantiate(namespace)  # builds the nested dataclasses; we build the outer one
    return config_type(**{field.name: filled[field.name] for field in dataclasses.fields(config_type)})


def near_misses(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" with the names closest to `name`, or "; known: ..." if none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else f"; known: {', '.join(known)}"


class Progress:
    """Show how much of `total` is done: a bar on a terminal, elsewhere a plain line every `every` seconds.

    Both show the rate and the time left; log files of jobs without a terminal stay readable.
    """

    def __init__(self, total: int, desc: str, unit: str = "it", every: float = 10.0) -> None:
        self.total, self.desc, self.unit, self.every = total, desc, unit, every
        self.done = 0
        self._started = self._printed = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=desc, unit=f" {unit}", dynamic_ncols=True, file=sys.stderr)

    def update(self, count: int = 1, note: str = "") -> None:
        """Add `count` finished units; `note` (a loss, a file name) is shown after the rate."""
        self.done += count
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
            return
        now = time.monotonic()
        if self.done < self.total and now - self._printed < self.every:
            return
        self._printed = now
        rate = self.done / max(now - self._started, 1e-9)
        left = f"{format_seconds((self.total - self.done) / rate)} left" if rate > 0 else "time left unknown"
        parts = (f"{self.done}/{self.total} {self.unit}", f"{rate:.3g} {self.unit}/s", left, note)
        print(f"{self.desc}: {', '.join(filter(None, parts))}", file=sys.stderr, flush=True)

    def tick(self, note: str) -> None:
        """Show a note while nothing is finished; where there is no terminal, with the next line that is due."""
        if self._bar is not None:
            self._bar.set_postfix_str(note)
        elif time.monotonic() - self._printed >= self.every and self.done < self.total:
            self.update(0, note)

    def write(self, message: str) -> None:
        """Print a line on stderr without tearing the bar."""
        if self._bar is not None:
            self._bar.write(message, file=sys.stderr)
        else:
            print(message, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def progress(total: int, desc: str, unit: str = "it", every: float = 10.0) -> Progress:
    """Return a Progress over `total` units named `unit`; use it in a `with` and call `update` as units finish."""
    return Progress(total, desc, unit, every)


def format_seconds(seconds: float) -> str:
    """Format a duration for people: '8 s', '3 min 05 s', '2 h 10 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def enable_compilation_cache() -> Path | None:
    """Turn on XLA's persistent compile cache, print its location in one line on stderr, and return the folder.

    The folder is ~/.cache/jaxmix/xla unless JAX_COMPILATION_CACHE_DIR names another (local or gs://). If it cannot be
    written, the line says so and None is returned: a missing cache is never a reason to stop.
    """
    import jax
    from etils import epath
    from jax.experimental.compilation_cache import compilation_cache

    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = epath.Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or Path(home) / "jaxmix" / "xla")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = sum(1 for _ in folder.glob("*-cache"))
    except OSError as error:
        print(f"compile cache: off ({folder}: {error.strerror})", file=sys.stderr)
        return None
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    compilation_cache.reset_cache()  # JAX decides at its first compilation, which may precede this call
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # many small programs add up as well
    print(f"compile cache: on, {folder} ({held} compiled programs)", file=sys.stderr)
    return folder


def start(distributed: bool = False) -> None:
    """Prepare JAX for a long command: join the other processes if there are any, and keep compiled programs.

    JAX finds the other processes by itself on Cloud TPU and under Slurm. Elsewhere the environment must name them:
    JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID. Raises `InputError` if it does not.
    """
    if distributed:
        join_processes()
    enable_compilation_cache()


def join_processes() -> None:
    """Join the other processes of this job through `jax.distributed`; see `start`."""
    import jax

    given = [os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")]
    # JAX's own notice of preemption takes SIGTERM away from a process without ending it, and hears none once Python
    # has a handler. Our loops have one, and agree by themselves; elsewhere SIGTERM is to end a process as usual.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        counts = [None if text is None else int(text) for text in given]
        jax.distributed.initialize(num_processes=counts[0], process_id=counts[1])
    except ValueError as error:
        raise InputError(
            f"distributed: {_one_line(str(error))} (JAX_COORDINATOR_ADDRESS="
            f"{os.environ.get('JAX_COORDINATOR_ADDRESS', 'not set')}, JAX_NUM_PROCESSES={given[0] or 'not set'}, "
            f"JAX_PROCESS_ID={given[1] or 'not set'})"
        ) from None


def _config_type(main: Callable[[Any], int | None]) -> type:
    (parameter,) = inspect.signature(main).parameters
    return typing.get_type_hints(main)[parameter]


def _program_name(main: Callable[[Any], int | None]) -> str:
    if PROGRAM:
        return " ".join(PROGRAM)
    module = inspect.getmodule(main)
    spec = getattr(module, "__spec__", None)  # under `python -m` __name__ is '__main__', the spec keeps the real name
    if spec is None:
        return Path(sys.argv[0]).name
    return "python -m " + spec.name.removesuffix(".__main__")  # appended when a package is run by its name


def version() -> str:
    """Return the version of the installed package."""
    from importlib import metadata

    try:
        return metadata.version("jaxmix-diffusion")
    except metadata.PackageNotFoundError:
        return "not installed (a checkout)"


def _normalise(
    argv: Sequence[str],
    known: set[str],
    switches: set[str],
    lists: Mapping[str, Any] = {},
    aliases: Mapping[str, str] = {},
    whole: Collection[str] = (),
) -> tuple[list[str], list[str]]:
    """Split argv into canonical flags and config files, refusing flags that match no field.

    `--a-b 1` becomes `--a_b=1`; a bare `--strict` of a bool field becomes `--strict=true`; what other tools call a flag
    becomes our name for it. A flag of a list may be repeated, with one value or a JSON list each time; of any other
    flag the last one counts.
    """
    arguments: list[str] = []
    files: list[str] = []
    listed: dict[str, list[Any]] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help", "--version") or word.startswith("--print_config"):
            arguments.append(word)
            continue
        if not word.startswith("--"):
            raise InputError(f"{shown(word)} is not a flag; every value needs one, as in --key VALUE")
        name, equals, value = word[2:].partition("=")
        key = name.replace("-", "_")
        key = aliases.get(key, key) if key not in known else key
        if key not in known and key != "config":
            raise InputError(f"unknown flag {shown('--' + name)[1:-1]}{near_misses(key[:60], known | {'config'})}")
        if not equals:
            if key in switches and (not rest or rest[0].lower() not in (*_BOOLEANS, *_NOTHING)):
                value = "true"
            elif rest:
                value = rest.pop(0)
            else:
                raise InputError(f"--{name} needs a value")
        if key == "config":
            files.append(value)
        elif key in whole and re.fullmatch(r"[+-]?\d+\.0*", value):
            arguments.append(f"--{key}={value.partition('.')[0]}")  # 7.0 is 7
        elif key in lists and value.lower() not in _NOTHING:
            listed.setdefault(key, []).extend(_items(value, lists[key]))
        else:
            arguments.append(f"--{key}={value}")
    arguments += [f"--{key}={json.dumps(values)}" for key, values in listed.items()]
    return arguments, files


def _is_list(hint: Any) -> bool:
    """Return whether a flag takes a list: `list[...]`, or a union with one."""
    return typing.get_origin(hint) is list or any(_is_list(part) for part in typing.get_args(hint) if part is not hint)


def _items(value: str, hint: Any) -> list[Any]:
    """Return what one value of a list's flag adds to the list: a JSON list, or one item."""
    import yaml

    if value.strip().startswith("["):
        try:
            found = yaml.safe_load(value)
        except (yaml.YAMLError, RecursionError):
            found = None
        if isinstance(found, list):
            return found
    if "str" in repr(hint):
        return [value]
    try:
        return [yaml.safe_load(value)]
    except (yaml.YAMLError, RecursionError):
        return [value]


def _check_file(path: str, known: set[str]) -> None:
    """Refuse a config file that is missing, is not a YAML mapping, or has a key that matches no field."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"--config {path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: not readable as YAML: {_one_line(str(error))}") from None
    if not isinstance(content, Mapping):
        raise InputError(f"--config {path}: found {type(content).__name__}, expected keys and values")
    for key in _flat_keys(content, known):
        if key not in known:
            raise InputError(f"--config {path}: unknown key '{key}'{near_misses(key, known)}")


def _flat_keys(content: Mapping[str, Any], known: set[str], prefix: str = "") -> Iterable[str]:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and any(other.startswith(f"{name}.") for other in known):
            yield from _flat_keys(value, known, f"{name}.")
        else:
            yield name


def _one_line(message: str) -> str:
    message = re.sub(r"\s+", " ", message).strip()
    message = re.sub(r'^Parser key "([^"]+)":', r"--\1:", message)
    message = re.sub(r"Expected an? (.+?)\. Got value: (.*)$", r"found \2, expected \1", message)
    message = re.sub(
        r"Does not validate .+? Subtypes: \[(.+?)\] Errors: .* Given value: (.*)$", r"found \2, expected \1", message
    )
    message = re.sub(r"(?:typing\.)?Literal\[([^\]]*)\]", r"one of \1", message)
    return re.sub(r"<class '(\w+)'>|typing\.", r"\1", message).replace(", NoneType", " or null")
