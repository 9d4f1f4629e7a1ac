"""What the documentation's site has beside docs/: the README, the changes, files to copy, and what --help prints.

mkdocs calls the functions below (`hooks` in mkdocs.yml). Pages link to files outside docs/ by their place in the
repository, so that the links work there, too; here they are made to lead to the site's copy.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent

PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
"""Pages that lie outside docs/, and what they are called in the site."""

COPIED = ("configs", "scripts/train.py")
"""Files and folders that pages link to."""

_LINK = re.compile(r"(?<=\]\()(?![a-z]+://|#)([^)#\s]+)")
_COMMAND = re.compile(r"^<!-- output: (.+) -->$", re.MULTILINE)
_PATH = re.compile(r"`((?:shardckpt(?!/[\dN]`)|launcher|scripts|configs|tests)/[\w./-]*\w)`")
_log = logging.getLogger("mkdocs.hooks.docs_site")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is outside docs/."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for name in COPIED:
        top = ROOT / name
        for path in sorted(top.iterdir()) if top.is_dir() else [top]:
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to where the files are in the site, put in what commands print, and check names of files."""
    del config, files
    folder = {site: Path(source).parent for source, site in PAGES.items()}.get(
        page.file.src_uri, Path("docs", page.file.src_uri).parent
    )
    for path in _PATH.findall(markdown):
        if not (ROOT / path).exists() and page.file.src_uri != "changelog.md":
            _log.warning("%s names `%s`, which does not exist", page.file.src_uri, path)
    markdown = _LINK.sub(lambda link: _in_site(link[1], folder, page.file.src_uri), markdown)
    return _COMMAND.sub(lambda line: f"```text\n{_output(line[1])}```", markdown)


def _in_site(link: str, folder: Path, page: str) -> str:
    """The link of a page, which lies in `folder` of the repository, as the site has it."""
    target = Path(os.path.normpath(folder / link)).as_posix()
    uri = PAGES.get(target, target.removeprefix("docs/"))
    return os.path.relpath(uri, Path(page).parent)


def _output(command: str) -> str:
    """What one of the project's commands prints, 88 columns wide."""
    name, *arguments = command.split()
    env = {**os.environ, "COLUMNS": "88"}
    done = subprocess.run(
        [Path(sys.executable).parent / name, *arguments],
        env=env,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.stdout
