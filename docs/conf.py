"""The documentation: Markdown by MyST, the API reference from the docstrings. The build needs no network."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import pkgutil
from functools import cache
from importlib.util import find_spec
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.inspect import signature, stringify_signature
from sphinx.util.nodes import make_refnode

import miar_monai

project = "MIAR for MONAI"
author = "MIAR contributors"
version = release = miar_monai.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
html_theme = "furo"
html_title = f"{project} {release}"
html_show_copyright = False

myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # the tables of the benchmarks and the model cards skip levels of headings

default_role = "py:obj"  # `names` in docstrings are links
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_mock_imports = [] if find_spec("triton") else ["triton"]
left_out = ["__main__", "_renamed", *(module.name for module in pkgutil.iter_modules(miar_monai.__path__[1:]))]
left_out += ["monailabel_app"]  # a program of MONAI Label, which is not installed here
autosummary_context = {"left_out": [f"miar_monai.{name}" for name in left_out]}
napoleon_use_param = napoleon_use_rtype = False
# attributes look like arguments, several in a line too
napoleon_custom_sections = [("Attributes", "params_style"), ("Reference", "references")]


@cache
def names_of(module: str) -> frozenset[str]:
    """Return the names that a module knows, with those that it imports for type checkers or inside functions."""
    there = importlib.import_module(module)
    source = "" if there is builtins else inspect.getsource(there)
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {(alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names}
    return frozenset({*vars(there), *vars(builtins), *imported})


def found(target: str) -> Any:
    """Return the object of a full name, or None."""
    try:
        return pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError):
        return None


def resolve(app: Sphinx, env: Any, node: Any, contnode: nodes.Node) -> nodes.Node | None:
    """Link a name, as code and docstrings write it, to where it is documented.

    Names of other packages stay text, since their inventories would need the network. A name that does not exist is
    left to Sphinx, which warns of it.
    """
    if node.get("refdomain") != "py":
        return None
    target, module, objects = node["reftarget"], node.get("py:module"), env.domains["py"].objects
    value = found(target)
    own = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"  # of a name that is re-exported
    if matches := [name for name in objects if name == own or f".{name}".endswith(f".{target}")]:
        entry = objects[name := min(matches, key=len)]
        return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, name)
    known = value is not None or target.split(".")[0] in names_of(module or "builtins")
    return contnode if known else None


def skip(app: Sphinx, what: str, name: str, value: Any, skipped: bool, options: Any) -> bool | None:
    """Leave out what a module re-exports: it is documented where it is defined."""
    here, home = app.env.temp_data.get("autodoc:module"), getattr(value, "__module__", None)
    ours = isinstance(home, str) and home.startswith("miar_monai")
    return True if what == "module" and ours and home != here else None


def keep_colons(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Let the first line of an attribute be text: napoleon takes what stands before a colon for its type."""
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]  # an empty comment


def sign(app: Sphinx, what: str, name: str, value: Any, options: Any, arguments: str, returns: str) -> Any:
    """Give a dictionary transform the arguments that it takes: MONAI's ``__new__`` takes any."""
    if what != "class" or arguments != "(*args, **kwargs)":
        return None
    taken = signature(value.__init__, bound_method=True)
    return stringify_signature(taken, show_return_annotation=False, unqualified_typehints=True), returns


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the functions above."""
    app.connect("missing-reference", resolve)
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-signature", sign)
    app.connect("autodoc-process-docstring", keep_colons, priority=400)  # before napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}
