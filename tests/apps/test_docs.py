"""The pages and the program agree: every command shown exists with the options shown, every option has its line."""

import re
import shlex
from pathlib import Path

import click
import pytest

from lilliput.apps import cli
from lilliput.apps.cli import VERBS

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *ROOT.glob("assets/*/*.md"),
]


def commands(page: Path) -> list[str]:
    """Every `lilliput VERB ..` in a page's code blocks, without comments, pipes and variables in front."""
    blocks = re.findall(
        r"^```(?:sh|bash|console)?\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [re.match(r"^\s*(?:\$ )?(?:[A-Z_]+=\S*\s+)*(?:\S*/)?lilliput\s+(.*)$", line) for line in lines]
    return [match[1] for match in found if match]


def parse(line: str) -> None:
    """Parse a command as click would, without running it."""
    words = shlex.split(line, comments=True)
    words = words[: next((i for i, word in enumerate(words) if word in {"|", ">", "&&", ";"}), len(words))]
    context, command = click.Context(cli.cli, info_name="lilliput", obj=cli.Output()), None
    while words and (command is None or isinstance(command, click.Group)):
        group = command or cli.cli
        assert isinstance(group, click.Group)
        command = group.get_command(context, words[0])
        assert command is not None, f"there is no command {words[0]}"
        words = words[1:]
    assert command is not None
    command.make_context(command.name, words, parent=context)


@pytest.mark.parametrize(
    ("page", "line"),
    [(page, line) for page in PAGES for line in commands(page)],
    ids=lambda v: str(getattr(v, "name", v)),
)
def test_a_command_shown_is_a_command_there_is(page: Path, line: str) -> None:
    parse(line)


def test_the_parser_of_this_test_sees_what_is_wrong() -> None:
    with pytest.raises(AssertionError, match="no command frob"):
        parse("frob x")
    with pytest.raises(click.UsageError):
        parse("run x -p y --frob")
    assert len(commands(ROOT / "README.md")) >= 8


@pytest.mark.parametrize("verb", list(VERBS))
def test_cli_page_has_every_option_of_every_verb(verb: str) -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {verb}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    assert section is not None
    command = cli.cli.get_command(click.Context(cli.cli), verb)
    assert command is not None
    options = [o for p in command.params if isinstance(p, click.Option) for o in (*p.opts, *p.secondary_opts)]
    missing = [o for o in options if o not in ("--json", "--quiet") and o not in section[1]]
    assert missing == []


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
