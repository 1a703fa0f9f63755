"""Whether the built pages are whole: ``python docs/check.py build/docs``; exit code 1 if not.

Sphinx's warnings are errors already. This looks at what came out: every page with all its headings, every
public name in the reference, every link and picture of a page there, nothing that was marked as a problem.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

import cnnops  # noqa: E402
import cnnops.functional  # noqa: E402
import cnnops.models  # noqa: E402
import cnnops.nn  # noqa: E402


class Page(HTMLParser):
    """What a page has: ids, the words of its headings, its links and pictures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.headings: list[str] = []
        self.targets: list[str] = []
        self.problems = 0
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        self.ids |= {found["id"]} if found.get("id") else set()
        self.problems += found.get("class") in ("problematic", "system-message")
        if tag in ("h1", "h2", "h3"):
            self._inside = tag
            self.headings.append("")
        elif tag == "a" and found.get("class", "") == "headerlink":
            self._inside = ""
        if tag == "a" and "href" in found:
            self.targets.append(found["href"])
        if tag in ("img", "script", "link"):
            self.targets += [found[key] for key in ("src", "href") if found.get(key)]

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside:
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.headings[-1] += data


def headings(markdown: str) -> list[str]:
    """The headings of a page's source, without its marks."""
    text = re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    return [re.sub(r"`", "", line) for line in re.findall(r"^#{1,3} (.+)$", text, re.MULTILINE)]


def public_names() -> dict[str, list[str]]:
    """Pages of the reference -> the names that must stand on them."""
    modules = (cnnops, cnnops.functional, cnnops.nn, cnnops.models)
    inner = {"functional", "nn", "tuned", "__version__"}  # pages of their own, and a text
    return {
        f"api/{module.__name__.rpartition('.')[2]}.html": [
            f"{module.__name__}.{name}" for name in module.__all__ if name not in inner
        ]
        for module in modules
    }


def complaints(built: Path) -> list[str]:
    """What is wrong with the pages in `built`."""
    pages = {path: Page(path) for path in built.rglob("*.html")}
    found = []
    for source in sorted(DOCS.rglob("*.md")):
        path = built / source.relative_to(DOCS).with_suffix(".html")
        if path not in pages:
            found.append(f"{path.name}: not built")
            continue
        shown = [" ".join(text.split()) for text in pages[path].headings]
        wanted = headings(source.read_text(encoding="utf-8"))
        missing = [text for text in wanted if _plain(text) not in map(_plain, shown)]
        found += [f"{path.name}: heading missing: {text}" for text in missing]
    for place, names in public_names().items():
        page = pages.get(built / place)
        found += [f"{place}: {name} missing" for name in names if not page or name not in page.ids]
    for path, page in pages.items():
        if page.problems:
            found.append(f"{path.name}: {page.problems} problems shown")
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            other = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not other.exists():
                found.append(f"{path.name}: no {target}")
            elif parts.fragment and other in pages and parts.fragment not in pages[other].ids:
                found.append(f"{path.name}: nothing is called #{parts.fragment} in {other.name}")
    return found


def _plain(text: str) -> str:
    """Letters alone: quotation marks are curled on the way, and words broken."""
    return re.sub(r"\W", "", text)


def main() -> int:
    built = Path(sys.argv[1]).resolve()
    found = complaints(built)
    print("\n".join(found) or f"{len(list(built.rglob('*.html')))} pages, all whole")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
