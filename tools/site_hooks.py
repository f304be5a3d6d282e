"""What `mkdocs build` calls: adds the generated pages, inlines drawings, and checks every link of the result."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

# mkdocs loads hooks by path, and the root of the repository is not on the path of its program.
sys.path.insert(0, str(Path(__file__).parent.parent))

from tools import site

DRAWING = re.compile(r'<img alt="([^"]*)" src="([^"]+\.svg)"\s*/?>')


@cache
def _generated() -> dict[str, str]:
    return site.pages()


def on_config(config: Any) -> Any:
    """Put the pages of the API where the navigation says `reference/api`."""
    pages = [path for path in _generated() if path.startswith("reference/api/")]
    _replace(config.nav, "reference/api", pages)
    return config


def _replace(nav: Any, wanted: str, pages: list[str]) -> None:
    for entry in nav:
        for title, value in entry.items() if isinstance(entry, dict) else ():
            if value == wanted:
                entry[title] = pages
            elif isinstance(value, list):
                _replace(value, wanted, pages)


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    for path, text in _generated().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Put drawings into the page itself, where they take its colors in light and dark mode."""

    def inline(found: re.Match[str]) -> str:
        path = (Path(page.file.src_uri).parent / found[2]).as_posix()
        drawing = (site.DOCS / re.sub(r"[^/]+/\.\./", "", path)).read_text(encoding="utf-8")
        return f'<span class="drawing" role="img" aria-label="{found[1]}">{drawing}</span>'

    return DRAWING.sub(inline, html)


def on_post_build(config: Any) -> None:
    """Raise unless every link, picture and anchor of the built pages leads somewhere in them."""
    folder = Path(config.site_dir)
    broken = sorted(set(find_broken_links(folder)))
    if broken:
        raise PluginError("links that lead nowhere:\n  " + "\n  ".join(broken))


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.targets: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                self.targets.append(value)


def find_broken_links(folder: Path) -> Iterator[str]:
    """`page: target` for every link into the site that leads nowhere, and for everything loaded from elsewhere."""
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in folder.rglob("*.html")}
    for path, page in pages.items():
        for target in page.targets:
            address, anchor = urldefrag(target)
            if re.match(r"[a-z]+:", address) or path.name == "404.html":
                continue
            there = (path.parent / unquote(address)).resolve() if address else path
            known = pages.get(there)
            missing = not there.exists() or (anchor and known is not None and unquote(anchor) not in known.anchors)
            if missing:
                yield f"{path.relative_to(folder)}: {target}"
