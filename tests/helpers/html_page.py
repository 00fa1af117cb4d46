"""The elements and the volumes of a page that `miar_monai.visualize.page` has written."""

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
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        key = self.elements[-1][1].get("id") if self.elements else None
        if key and self.open[-1] == "script":
            self.texts[key] = self.texts.get(key, "") + data

    def volume(self, key: str) -> nib.Nifti1Image:
        return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(self.texts[key])))
