"""How sphinx builds these pages: ``make docs``.

Docstrings are plain text. A name in single backticks is code, and a link where it is the name of something
that the reference has; what begins with "cnnops." must be. Warnings are errors.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from docutils import nodes

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import cnnops  # noqa: E402

project = "cnnops"
author = "cnnops contributors"
copyright = author  # noqa: A001 (sphinx's name for it)
version = release = cnnops.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

suppress_warnings = ["misc.highlighting_failure"]  # quotations, in which … marks what is left out
nitpicky = True
default_role = "py:obj"
# Names of other packages are code, not links: nothing is fetched while pages are built.
nitpick_ignore_regex = [
    ("py:obj", r"(?!cnnops\.).*"),
    ("py:(class|data|func|exc)", r"(torch|collections|types|pathlib|os|typing)\..*"),
    ("py:class", r"(Module|ModuleType|Tensor|Path|Any|Ints|Sizes|Size|Header|Shape)"),
    # Rooms behind the reference, which docstrings point the reader of the source to.
    ("py:(obj|class)", r"cnnops\.(summary\.(field|report\.document)|registry\.Row|shapes\..*)"),
]

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_inherit_docstrings = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90

html_theme = "furo"
html_title = f"cnnops {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_show_sphinx = False
html_copy_source = False


def _hide_constructor(
    app: Any, what: str, name: str, thing: Any, *_: Any
) -> tuple[str, None] | None:
    """A dataclass here is a result: nobody but this package makes one."""
    return ("", None) if what == "class" and dataclasses.is_dataclass(thing) else None


def _keep_tables(
    app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Text that stands four spaces in behind an empty line is code, as in Markdown."""
    kept: list[str] = []
    inside = False
    for line in lines:
        indented = line.startswith("    ")
        if indented and not inside and kept and not kept[-1].strip():
            kept += ["::", ""]
        inside = indented or (inside and not line.strip())
        kept.append(line)
    lines[:] = kept


def _link_names(app: Any, doctree: nodes.document, page: str) -> None:
    """Code on a page that is the name of something in the reference, perhaps with arguments, links to it.

    Pages have no marks of sphinx's own for this, so that they can be read where they lie, too.
    """
    known = app.env.domains.python_domain.objects
    for code in list(doctree.findall(nodes.literal)):
        name = code.astext().partition("(")[0]
        found = known.get(name) if name.startswith("cnnops.") else None
        if found and not isinstance(code.parent, nodes.reference):
            target = app.builder.get_relative_uri(page, found.docname) + f"#{found.node_id}"
            link = nodes.reference("", "", internal=True, refuri=target)
            code.replace_self(link)
            link += code


def setup(app: Any) -> None:
    app.connect("autodoc-process-signature", _hide_constructor)
    app.connect("autodoc-process-docstring", _keep_tables)
    app.connect("doctree-resolved", _link_names)
