"""The command line: one result on stdout, one line for an error, and the code a shell reads."""

import errno
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from lilliput.apps import cli
from lilliput.apps.cli import VERBS, main
from lilliput.apps.cli.output import table
from lilliput.core import errors

Shell = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """Run `python -m lilliput` in an empty folder, away from our variables."""

    def run(*args: str, **env: str) -> "subprocess.CompletedProcess[str]":
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("LILLIPUT_")}
        command = [sys.executable, "-m", "lilliput", *args]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=inherited | env, timeout=120)

    return run


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make `lilliput recipes` raise."""

    def named() -> dict[str, str]:
        raise error

    monkeypatch.setattr("lilliput.core.recipe.named", named)


def test_help_and_import_load_nothing_heavy() -> None:
    code = "import sys, lilliput\nfrom lilliput.apps.cli import main\nassert main(['--help']) == 0\n" + (
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'pydantic', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=60)


def test_every_verb_has_help_that_documents_its_json_and_loads_no_torch() -> None:
    code = "import sys\nfrom lilliput.apps.cli import VERBS, main\nfor verb in VERBS:\n" + (
        "    assert main([verb, '--help']) == 0\n    print('====')\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for verb, text in zip(VERBS, done.stdout.split("====\n"), strict=False):
        assert text.startswith(f"Usage: lilliput {verb}")
        assert "JSON" in text


def test_listed_verbs_are_the_files() -> None:
    folder = Path(cli.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "options", "output"}
    assert files == set(VERBS)


def test_json_is_one_document_before_or_after_the_verb(shell: Shell) -> None:
    before, after = shell("--json", "recipes"), shell("recipes", "--json")
    assert before.stdout == after.stdout == shell("recipes", LILLIPUT_JSON="1").stdout
    assert "nested" in json.loads(before.stdout)["recipes"]


def test_show_prints_a_recipe_that_compress_would_take(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(shell("recipes", "show", "nested").stdout)
    mine = json.loads(shell("recipes", "show", "mine.yaml", "--json").stdout)
    assert mine["stages"] == json.loads(shell("recipes", "show", "nested", "--json").stdout)["stages"]


def test_methods_list_needs_no_torch_and_one_shows_its_options(shell: Shell) -> None:
    assert json.loads(shell("methods", "--json").stdout)["methods"]["rtn"].endswith(":RTN")
    pytest.importorskip("torch")
    one = json.loads(shell("methods", "wanda", "--json").stdout)
    assert one["needs"] == "input_norm"
    assert one["options"]["sparsity"] == 0.5


def test_doctor_tells_what_is_there_and_hides_secrets(shell: Shell) -> None:
    done = shell("doctor", "--json", HF_TOKEN="hf_secret", LILLIPUT_SERVE_API_KEY="s3cret")
    document = json.loads(done.stdout)
    assert done.returncode == 0, document["problems"]
    assert document["ok"]
    assert document["kernels"]["matmul_nested"]
    assert document["environment"]["cores"] >= 1
    assert "secret" not in done.stdout
    assert "s3cret" not in done.stdout
    assert "kernel matmul_nested" in shell("doctor").stdout


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["frob"], 2, "No such command 'frob'"),
        (["run", "x"], 2, "Missing option '-p'"),
        (["run", "x", "-p", "a", "--top-p", "0"], 2, "--top-p"),
        (["compress", "m", "-o", "o", "--bits", "9"], 2, "is no list of widths"),
        (["compress", "m", "-o", "o", "--bits", "2,,3"], 2, "is no list of widths"),
        (["compress", "m", "-o", "o", "--max-ram", "lots"], 2, "'lots' is no size"),
        (["compress", "m", "-o", "o", "--group-size", "0"], 2, "--group-size"),
        (["recipes", "show", "frob"], 2, "'frob' is not known"),
        (["methods", "frob"], 2, "'frob' is not known"),
        (["run", "nothere", "-p", "a"], 3, "nothere"),
        (["verify", "nothere"], 3, "nothere"),
        (["inspect", "./nothere"], 3, "nothere"),
        (["eval", "nothere", "--text", "x.txt"], 3, "nothere"),
        (["bench", "nothere"], 3, "nothere"),
    ],
)
def test_an_error_is_one_line_a_code_and_with_json_a_document(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    code: int,
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*args, "--json"]) == code
    out, err = capsys.readouterr()
    line = err.splitlines()[-1]
    assert line.startswith("error: ")
    assert text in line
    assert "Traceback" not in err
    error = json.loads(out)["error"]
    assert error["exit_code"] == code
    assert f"error: {error['message']}" == line
    assert main(args) == code
    assert capsys.readouterr().out == ""


def test_the_shell_sees_the_code(shell: Shell) -> None:
    assert shell("verify", "nothere").returncode == 3
    assert shell("frob").returncode == 2
    assert shell("--version").stdout.startswith("lilliput ")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("what", "where", "Fix"), 2),
        (errors.InputCorrupt("what", "where", "Fix"), 3),
        (errors.InputUnsafe("what", "where", "Fix"), 3),
        (errors.Unsupported("what", "where", "Fix"), 4),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 4),
        (errors.OutOfResource("what", "where", "Fix"), 5),
        (MemoryError(), 5),
        (OSError(errno.ENOSPC, "No space left on device", "file"), 5),
        (errors.QualityFailed("what", "where", "Fix"), 6),
        (KeyboardInterrupt(), 130),
        (errors.Interrupted("stopped", "where", "Repeat the same command"), 130),
        (RuntimeError("oops"), 1),
        (ModuleNotFoundError("No module named 'lilliput.frob'", name="lilliput.frob"), 1),
        (OSError(errno.EIO, "I/O error"), 1),
        (SystemError("oops"), 1),
    ],
)
def test_errors_become_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    fail_with(monkeypatch, error)
    assert main(["recipes", "--json"]) == code
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["exit_code"] == code
    assert ("Traceback" in err) == (code == 1)
    assert err.splitlines()[-1].startswith("error: ")
    if isinstance(error, errors.LilliputError):
        assert err == f"error: {error}\n"


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{shlex.quote(sys.executable)} -m lilliput doctor | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.returncode in (0, 141)


def test_a_closed_or_full_stdout_does_not_end_in_a_traceback() -> None:
    start = f"{shlex.quote(sys.executable)} -m lilliput recipes"
    closed = subprocess.run(["bash", "-c", f"{start} >&-"], capture_output=True, text=True, timeout=60)
    assert (closed.returncode, closed.stderr) == (0, "")
    if Path("/dev/full").exists():
        full = subprocess.run(["bash", "-c", f"{start} > /dev/full"], capture_output=True, text=True, timeout=60)
        assert full.returncode == 5
        assert full.stderr.startswith("error: ")
        assert "Traceback" not in full.stderr


def parsed(verb: str, *args: str, **env: str) -> dict[str, Any]:
    """What a verb would be called with."""
    group = click.Context(cli.cli, info_name="lilliput", obj=cli.Output(), auto_envvar_prefix="LILLIPUT")
    command = cli.cli.get_command(group, verb)
    assert command is not None
    with CliRunner().isolation(env=env):
        return command.make_context(verb, list(args), parent=group).params


def test_commas_repeated_flags_and_the_environment_say_the_same() -> None:
    base = ("m", "-o", "out")
    assert parsed("compress", *base)["bits"] is None
    assert parsed("compress", *base, "--bits", "8,2")["bits"] == [2, 8]
    assert parsed("compress", *base, "--bits", "2", "--bits", "8, 2")["bits"] == [2, 8]
    assert parsed("compress", *base, LILLIPUT_COMPRESS_BITS="2,8")["bits"] == [2, 8]
    assert parsed("compress", *base, "--bits", "4", LILLIPUT_COMPRESS_BITS="2,8")["bits"] == [4]
    assert parsed("compress", *base)["target_bits"] is None
    assert parsed("compress", *base, "--target-bits", "2.8", "--target-bits", "3.6,4.6")["target_bits"] == (
        2.8,
        3.6,
        4.6,
    )
    assert parsed("compress", *base, LILLIPUT_COMPRESS_TARGET_BITS="2.8,3.6")["target_bits"] == (2.8, 3.6)


def test_every_option_has_a_twin_of_its_own_name_in_the_environment() -> None:
    group = click.Context(cli.cli, info_name="lilliput", auto_envvar_prefix="LILLIPUT")
    seen = 0
    for verb in cli.cli.list_commands(group):
        command = cli.cli.get_command(group, verb)
        assert command is not None
        context = click.Context(command, info_name=verb, parent=group)
        for option in (p for p in command.params if isinstance(p, click.Option) and p.name != "help"):
            flag = next(flag for flag in option.opts if flag.startswith("--"))
            twin = f"LILLIPUT_{verb}_{flag[2:]}".replace("-", "_").upper()
            with CliRunner().isolation(env={twin: "7"}):
                assert option.resolve_envvar_value(context) == "7", twin
            seen += 1
    assert seen > 40
    assert parsed("compress", "m", LILLIPUT_COMPRESS_OUT="there")["target"] == Path("there")


@pytest.mark.parametrize(("text", "size"), [("8GiB", 8 << 30), ("500MB", 500_000_000), ("4096", 4096)])
def test_sizes(text: str, size: int) -> None:
    assert parsed("compress", "m", "-o", "out", "--max-ram", text)["max_ram"] == size


def test_a_table_shows_the_columns_somebody_has() -> None:
    rows = [{"bits": 2, "kl": 0.5}, {"bits": 10, "kl": None}]
    shown = table(rows, {"bits": "bits", "kl": "KL", "top1": "top-1"})
    assert shown == "bits     KL\n----  -----\n   2  0.500\n  10      -"
