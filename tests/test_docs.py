"""What the pages say of the repository is so: links, options, names, and the words they use."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import typer.main

from smlp_deploy import errors
from smlp_deploy.cli import command_line

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
GENERATED = DOCS / "terminal.md"
"""Written by scripts/captures.py; among its commands are some that are wrong on purpose."""
PAGES = sorted(
    [
        *(
            ROOT / name
            for name in (
                "README.md",
                "CHANGELOG.md",
                "benchmarks/README.md",
                "benchmarks/lowering.md",
                "smlp_deploy/data/README.md",
            )
        ),
        *DOCS.glob("*.md"),
    ]
)
WRITTEN = [page for page in PAGES if page != GENERATED]
# Words with a plainer or a more usual one in their place.
AVOIDED = (
    r"mend(s|ed|ing)?|heed(s|ed)?|at hand|for want of|lest|is (no|none)|strangers?|anybody|flavours?|stand-ins?"
    r"|straight (export|fp32)|harm(s|ed|ful)?|parts? from|half-made|cards?|kernel traffic"
)
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^(?: {4}.*\n)+", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_SPAN = re.compile(r"`([^`\n]+)`")
_DOCUMENTED = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
_ERROR_ROW = re.compile(r"^\| `(\w+Error)` \|.*\| (\d+)[^|]* \|$", re.MULTILINE)
_OPTION = re.compile(r"(?<![\w-])--?[a-z][a-z0-9-]*")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def anchors(page: Path) -> frozenset[str]:
    """What headings of a page are called in links, as GitHub and the site make it of their text."""
    headings = re.findall(r"^#+ (.+)$", _FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


def code_of(page: Path) -> Iterator[str]:
    """Lines of code blocks, lines that end in a backslash joined, and what stands between backticks."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for block in (*_FENCED.findall(text), *_INDENTED.findall(_FENCED.sub("", text))):
        yield from (line.split(" #")[0] for line in block.splitlines())
    yield from _SPAN.findall(_INDENTED.sub("", _FENCED.sub("", text)))


@cache
def verbs() -> dict[str, frozenset[str]]:
    """Every verb and its options; those of `smlp` itself are under the empty name."""
    root = typer.main.get_command(command_line())
    commands = {"": root, **root.commands}  # type: ignore[attr-defined]
    options = {
        verb: {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for verb, command in commands.items()
    }
    return {verb: frozenset({"--help", "-h", *names}) for verb, names in options.items()}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in _LINK.findall(_FENCED.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def test_the_site_has_every_page() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"^ +- [^:\n]+: (\S+\.md)$", nav, re.MULTILINE)
    assert sorted(listed) == sorted(map(name_of, PAGES))


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=name_of)
def test_the_first_page_leads_to_every_other(page: Path) -> None:
    links = _LINK.findall((DOCS / "index.md").read_text(encoding="utf-8"))
    assert page.name == "index.md" or page.name in {link.partition("#")[0] for link in links}


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_verbs_and_their_options_exist(page: Path) -> None:
    known = frozenset().union(*verbs().values())
    for code in code_of(page):
        for words in re.findall(r"\bsmlp( [^|]*|$)", code):
            verb = next(iter(re.findall(r"^ ([a-z][a-z-]*)(?= |$)", words)), "")
            assert verb in verbs(), code
            assert set(_OPTION.findall(words)) <= verbs()[verb], code
        if code.startswith("-"):
            assert set(_OPTION.findall(code)) <= known, code


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_modules_that_are_named_exist(page: Path) -> None:
    for code in code_of(page):
        for name in re.findall(r"(?<![\w/.])[a-z_]+(?:/[a-z_]+)+\.py\b", code):
            assert (ROOT / name).is_file() or (ROOT / "smlp_deploy" / name).is_file(), name


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_targets_of_make_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for code in code_of(page):
        assert set(re.findall(r"^ *make ([a-z]+)", code)) <= set(targets), code


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_words_are_plain(page: Path) -> None:
    text = " ".join(page.read_text(encoding="utf-8").split())
    found = [match.group() for match in re.finditer(rf"\b({AVOIDED})\b", text, re.IGNORECASE)]
    assert not found


@pytest.mark.parametrize("name", _DOCUMENTED)
def test_what_the_api_page_documents_exists(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    documented = getattr(import_module(module), attribute)
    assert documented.__doc__


def test_the_api_page_has_every_error() -> None:
    table = dict(_ERROR_ROW.findall((DOCS / "api.md").read_text(encoding="utf-8")))
    defined = {name: value for name, value in vars(errors).items() if name.endswith("Error")}
    assert table.keys() == defined.keys()
    without_signal = {name: kind for name, kind in defined.items() if kind is not errors.StoppedError}
    assert {name: int(table[name]) for name in without_signal} == {n: k.exit_code for n, k in without_signal.items()}
