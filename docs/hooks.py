"""Adds pages that live outside `docs/` to the site, and turns links to them into links inside
it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/RESULTS.md", "benchmarks/LOG.md")
SOURCES = "examples/*.py"


def on_files(files: Files, config: Any) -> Files:
    """The pages of `docs/`, with `PAGES` and the examples at the same places as in the
    repository.
    """
    sources = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(SOURCES))]
    for name in (*PAGES, *sources):
        files.append(File.generated(config, name, content=(ROOT / name).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The page, its links to the repository's root shortened by the folder that the site lacks."""
    if page.file.src_uri in PAGES:
        return re.sub(r"\]\((\.\./)?docs/", r"](\1", markdown)
    return markdown.replace("](../", "](")
