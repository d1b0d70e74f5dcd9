"""What every command line promises: flags from a dataclass, flags over files, one line for a mistake."""

import dataclasses
import importlib
import subprocess
import sys

import pytest

from jaxmix.__main__ import main as jaxmix_command
from jaxmix.command import Progress, enable_compilation_cache, format_seconds, parse, run
from jaxmix.types import InputError


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How to step.

    Attributes:
        learning_rate: peak rate, a step
    """

    learning_rate: float = 1e-3


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to do.

    Attributes:
        batch_size: images a step
        name: what to call it
        verbose: say more
    """

    batch_size: int = 8
    name: str | None = None
    verbose: bool = False
    sizes: tuple[int, ...] = (1, 2)
    optimizer: Optimizer = Optimizer()


def command(settings: Settings) -> int:
    if settings.batch_size < 1:
        raise InputError("batch_size: expected at least 1")
    if settings.name == "interrupt":
        raise KeyboardInterrupt
    if settings.name is not None:
        open(settings.name).close()
    return 0


def test_without_flags_the_defaults_stand():
    assert parse(command, []) == Settings()


def test_flags_win_over_the_file_wherever_they_stand(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("batch_size: 4\noptimizer:\n  learning_rate: 0.5\n")
    found = parse(command, ["--batch-size", "2", "--config", str(file), "--sizes=[3]", "--verbose"])
    assert found == Settings(batch_size=2, verbose=True, sizes=(3,), optimizer=Optimizer(0.5))


@pytest.mark.parametrize("flags", [["--optimizer.learning-rate", "2"], ["--optimizer.learning_rate=2"]])
def test_dashes_and_underscores_are_the_same(flags):
    assert parse(command, flags).optimizer.learning_rate == 2.0


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("batchsize: 4", "unknown key 'batchsize'; did you mean 'batch_size'"),
        (
            "optimizer: {learning_rat: 1}",
            "unknown key 'optimizer.learning_rat'; did you mean 'optimizer.learning_rate'",
        ),
        ("batch_size: many", "batch_size: found many, expected int"),
        ("- 1", "found list, expected keys and values"),
        ("a: [", "not readable as YAML"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(tmp_path, content, found):
    file = tmp_path / "wrong.yaml"
    file.write_text(content)
    with pytest.raises(InputError) as error:
        parse(command, ["--config", str(file)])
    assert found in str(error.value) and "wrong.yaml" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (["--batchsize", "4"], "unknown flag --batchsize; did you mean 'batch_size'"),
        (["--batch_size"], "--batch_size needs a value"),
        (["--batch_size", "4.5"], "batch_size: found 4.5, expected int"),
        (["4"], "'4' is not a flag"),
        (["--config", "gone.yaml"], "gone.yaml: no such file"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, found):
    with pytest.raises(InputError) as error:
        parse(command, flags)
    assert found in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "status", "error"),
    [
        ([], 0, ""),
        (["--batch-size", "0"], 2, "error: batch_size: expected at least 1\n"),
        (["--name", "gone/file"], 2, "error: gone/file: No such file or directory\n"),
        (["--name", "interrupt"], 130, "interrupted\n"),
    ],
)
def test_statuses_and_stderr(capsys, flags, status, error):
    with pytest.raises(SystemExit) as end:
        run(command, flags)
    assert (end.value.code, capsys.readouterr().err) == (status, error)


def test_help_tells_what_a_field_is_and_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        run(command, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert "images a step (type: int, default: 8)" in text and "peak rate, a step" in text


def test_progress_without_a_terminal_is_plain_lines_with_the_time_left(capsys):
    with Progress(4, "train", "steps", every=0.0) as bar:
        bar.update(3, note="loss 0.5")
        bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("train: 3/4 steps, ") and lines[0].endswith(" left, loss 0.5")
    assert lines[1].startswith("train: 4/4 steps, ")


def test_seconds_are_told_as_people_do():
    assert [format_seconds(s) for s in (7.6, 185, 7800)] == ["8 s", "3 min 05 s", "2 h 10 min"]


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert enable_compilation_cache() is None
    assert capsys.readouterr().err.startswith("compile cache: off")


@pytest.mark.parametrize("name", ["autoencoder", "text_to_image", "vmix", "scorer", "segmenter"])
def test_a_default_that_a_trainer_inherits_is_what_its_own_module_says(name):
    module = importlib.import_module(f"train.{name}")
    given = {"output_dir": "runs/x"}
    if name == "vmix":
        given |= {"pretrained_model_name_or_path": "mini", "train_data_dir": "pictures"}
    parsed = parse(module.main, [f"--{key}={value}" for key, value in given.items()])
    assert parsed == module.Config(**given)


def test_flags_of_lists_may_be_repeated_and_of_others_the_last_counts(tmp_path):
    from infer.flags import Config as Generate

    def parsed(*words):
        return parse(_generate, words)

    def _generate(config: Generate) -> None: ...

    _generate.__annotations__ = {"config": Generate, "return": None}
    assert parsed("--lora", "a:0.8", "--lora", "b,c").lora == ["a:0.8", "b,c"]
    assert parsed("--lora", '["a", "b:2"]', "--lora=c").lora == ["a", "b:2", "c"]
    assert parsed("--lora", "a").lora == ["a"] and parsed("--lora", "null").lora is None
    assert parsed("--steps", "3", "--steps", "5").steps == 5
    assert (parsed("--steps", "7.0").steps, parsed("--seed=8.").seed) == (7, 8)
    known = parsed(
        "--num_inference_steps", "7", "--scheduler=euler", "--W", "64", "--H=32", "--n_iter", "2", "--cfg", "3"
    )
    assert (known.steps, known.sampler, known.width, known.height) == (7, "euler", 64, 32)
    assert (known.num_images, known.guidance_scale) == (2, 3.0)
    file = tmp_path / "c.yaml"
    file.write_text("lora: [a, b]\nsteps: 9\n")
    assert parsed("--config", str(file)).lora == ["a", "b"] and parsed("--config", str(file), "--steps", "1").steps == 1
    with pytest.raises(InputError, match="unknown flag --num_image; did you mean 'num_images'"):
        parsed("--num_image", "3")


def test_the_command_jaxmix_names_the_tools_and_runs_them(capsys):
    assert jaxmix_command([]) == 0
    listed = capsys.readouterr().out
    assert "  generate " in listed and "  train vmix " in listed and "style-transfer" in listed
    assert "Draw images from prompts" in listed
    for words in (["train"], ["train", "--help"], ["help"]):
        assert jaxmix_command(words) == 0 and capsys.readouterr().out == listed
    assert jaxmix_command(["train", "vmx"]) == 2
    assert "error: unknown command 'train vmx'; did you mean 'train vmix'" in capsys.readouterr().err
    assert jaxmix_command(["generat"]) == 2
    assert "error: unknown command 'generat'; did you mean 'generate'" in capsys.readouterr().err
    words = ["train", "vmix", "--rank", "x"]
    bad = subprocess.run([sys.executable, "-m", "jaxmix", *words], capture_output=True, text=True, timeout=120)
    assert bad.returncode == 2 and "error: --rank: found x" in bad.stderr and "Traceback" not in bad.stderr
