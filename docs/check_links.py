"""Whether every link of the built site leads somewhere: `python docs/check_links.py out/docs`.

Every relative link and picture of every page must name a file of the site, and every anchor an
element of its page. Addresses of other sites are checked for their form only, because neither CI
nor a build machine need have a network; they are counted, so that nobody takes them for visited.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ELSEWHERE = ("http", "https")
IN_PLACE = ("data", "mailto")
_HOST = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\.)+[a-z]{2,}", re.IGNORECASE)


class Page(HTMLParser):
    """Links and anchors of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value is None:
                continue
            if name == "id" or (name == "name" and tag == "a"):
                self.anchors.add(value)
            elif name in ("href", "src") and tag != "base":
                self.links.append(value)


def broken(folder: Path) -> tuple[list[str], set[str]]:
    """What is wrong with the links of a site, in words, and the addresses of other sites.

    Args:
        folder: the built site.
    """
    folder = folder.resolve()
    pages = {path: Page(path.read_text("utf-8")) for path in sorted(folder.rglob("*.html"))}
    elsewhere: set[str] = set()
    wrong = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme in ELSEWHERE:
                elsewhere.add(link)
                if not _HOST.fullmatch(parts.hostname or ""):
                    wrong.append(f"{path.relative_to(folder)}: {link} names no host")
            elif parts.scheme not in IN_PLACE:
                wrong += [
                    f"{path.relative_to(folder)}: {link} {why}"
                    for why in _inside(folder, path, parts.path, parts.fragment, pages)
                ]
    return wrong, elsewhere


def _inside(
    folder: Path, path: Path, target: str, anchor: str, pages: dict[Path, Page]
) -> Iterator[str]:
    """What is wrong with a link from the page at `path` to a file of the site."""
    file = (path.parent / unquote(target)).resolve() if target else path
    file = file / "index.html" if file.is_dir() else file
    if not (file.is_file() and file.is_relative_to(folder)):
        yield "names no file of the site"
    elif anchor and file in pages and unquote(anchor) not in pages[file].anchors:
        yield "names an anchor that its page does not have"


def main() -> None:
    """Print what is wrong; exit with 1 if anything is."""
    folder = Path(sys.argv[1])
    wrong, elsewhere = broken(folder)
    for line in wrong:
        print(line, file=sys.stderr)
    print(
        f"{len(wrong)} broken links in {folder}; {len(elsewhere)} addresses of other sites are well"
        " formed or named above, and were not visited"
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
