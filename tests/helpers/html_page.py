"""The elements, the tables and the volumes of a page that the package has written."""

from __future__ import annotations

import base64
import gzip
from html.parser import HTMLParser

import nibabel as nib

VOID = {"meta", "input", "link", "br", "img", "hr"}


class Page(HTMLParser):
    """The elements of a page; fails if they are not nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.tables: list[list[list[str]]] = []
        """The cells of each row of each table."""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        key = self.elements[-1][1].get("id") if self.elements else None
        if key and self.open[-1] == "script":
            self.texts[key] = self.texts.get(key, "") + data
        if {"th", "td"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def assert_loads_nothing(self, num_scripts: int) -> None:
        """Check that no element names another place, and that the policy allows the page's own scripts alone."""
        for tag, found in self.elements:
            assert tag not in {"link", "iframe", "object", "embed", "base"}
            assert not {"srcset", "action", "data", "poster", "formaction", "style"} & set(found)
            assert not [name for name in found if name.startswith("on")]
            assert (found.get("src") or "data:").startswith("data:")
            assert (found.get("href") or "#").startswith("#")
        (policy,) = [
            found["content"] or "" for _, found in self.elements if found.get("http-equiv") == "Content-Security-Policy"
        ]
        rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
        assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
        assert rules["img-src"] == "data:"
        assert "unsafe" not in policy
        assert "http" not in policy
        assert rules["script-src"].count("sha256-") == num_scripts

    def volume(self, key: str) -> nib.Nifti1Image:
        return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(self.texts[key])))
