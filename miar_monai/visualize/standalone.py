"""What HTML pages that contain all that they need have in common: head, Content-Security-Policy and writing."""

from __future__ import annotations

import base64
import hashlib
import os
from html import escape
from pathlib import Path

from miar_monai.data.atomic_write import atomic_file

__all__ = ["content_policy", "page_head", "write_html"]


def content_policy(style: str, *scripts: str) -> str:
    """Return a policy that allows the page its own style, scripts and pictures, and no request.

    Args:
        style: text of the style element.
        scripts: texts of the script elements, as they are in the page, byte by byte.

    Example:
        >>> content_policy("p { margin: 0; }").partition("; ")[0]
        "default-src 'none'"
    """
    allowed = " ".join(map(_hash, scripts)) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_hash(style)}; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )


def page_head(title: str, style: str, *scripts: str) -> str:
    """Return the beginning of a page, from its doctype to the heading of its body.

    Args:
        title: of the page, as plain text.
        style: see `content_policy`.
        scripts: see `content_policy`.

    Example:
        >>> page_head("a < b", "").splitlines()[6]
        '<title>a &lt; b</title>'
    """
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{content_policy(style, *scripts)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body data-state="loading">
<header>
<h1>{escape(title)}</h1>
<p>For research, not for clinical use: detail of a super-resolved image may be invented.</p>
</header>"""


def write_html(path: str | os.PathLike[str], page: str, overwrite: bool = False) -> Path:
    """Write a page and return its path.

    Raises:
        OutputError: if the file exists and ``overwrite`` is False, or if it cannot be written.
    """
    with atomic_file(path, overwrite) as part:
        part.write_bytes(page.encode("utf-8"))  # the policy names hashes of its scripts, so not a byte may change
    return Path(path)


def _hash(text: str) -> str:
    """Return the source expression of an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode()}'"
