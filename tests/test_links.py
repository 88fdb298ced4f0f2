"""Relative links of every Markdown page and notebook lead to files and headings that are there.

`make docs` checks the links of the built site. Addresses of other sites are not visited: tests use
no network.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

from check_links import broken  # noqa: E402

GENERATED = {"docs/generated", "docs/statistics.md", "docs/gallery.md"}
"""Made by docs/generate.py when the site is built."""
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "docs/**/*.ipynb", "reports/**/*.md", "tests/**/*.md")
    for path in ROOT.glob(pattern)
    if not {"out", ".venv", "node_modules", "_build"} & set(path.relative_to(ROOT).parts)
    and str(path.relative_to(ROOT)) not in GENERATED
)
_CODE = re.compile(r"^(```|~~~).*?^\1|`[^`\n]*`", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")


def text_of(path: Path) -> str:
    """A page, or the prose of a notebook, without code."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join(
            "".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"
        )
    return _CODE.sub("", text)


def anchors(path: Path) -> set[str]:
    """Names that GitHub and MyST give to the headings of a page."""
    text = re.sub(r"^(```|~~~).*?^\1", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()).strip() for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


def links() -> Iterator[tuple[Path, str]]:
    for path in PAGES:
        for link in _LINK.findall(text_of(path)):
            yield path, link


def test_links_between_pages_lead_to_files_and_headings() -> None:
    wrong, count = [], 0
    for path, link in links():
        if re.match(r"[a-z]+:", link):
            continue
        count += 1
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        inside = str(target.relative_to(ROOT))
        if any(inside == made or inside.startswith(f"{made}/") for made in GENERATED):
            continue
        if not target.exists():
            wrong.append(f"{path.relative_to(ROOT)}: no file {link}")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            wrong.append(f"{path.relative_to(ROOT)}: no heading {link}")
    assert wrong == []
    assert count > 20


def test_addresses_of_other_sites_are_secure_and_name_a_host() -> None:
    addresses = [link for _, link in links() if re.match(r"[a-z]+:", link)]
    assert addresses
    assert [a for a in addresses if not re.match(r"https://[\w-]+(\.[\w-]+)+(/|$)", a)] == []


@pytest.mark.parametrize(
    ("link", "wrong"),
    [
        ("other.html", False),
        ("other.html#there", False),
        ("#here", False),
        ("folder/", False),
        ("a%20file.txt", False),
        ("https://example.org/x#y", False),
        ("data:image/png;base64,AA", False),
        ("missing.html", True),
        ("other.html#nowhere", True),
        ("#nowhere", True),
        ("../outside.html", True),
        ("https:///no-host", True),
    ],
)
def test_a_broken_link_of_a_built_site_is_found(tmp_path: Path, link: str, wrong: bool) -> None:
    site = tmp_path / "site"
    (site / "folder").mkdir(parents=True)
    (tmp_path / "outside.html").write_text("<p>")
    (site / "folder" / "index.html").write_text("<p>")
    (site / "a file.txt").write_text("")
    (site / "other.html").write_text('<p id="there">')
    (site / "index.html").write_text(f'<p id="here"><a href="{link}">x</a>')
    found, _ = broken(site)
    assert bool(found) == wrong, found
