"""The page of a run: one HTML file that needs no network, made of the documents in a saved folder."""

from scap_hub.page.family import family_picture
from scap_hub.page.folder import FAMILY, FAMILY_PICTURE, PAGE, REPORT, family_json, page_of, to_publish, write_page
from scap_hub.page.html import render

__all__ = [
    "FAMILY",
    "FAMILY_PICTURE",
    "PAGE",
    "REPORT",
    "family_json",
    "family_picture",
    "page_of",
    "render",
    "to_publish",
    "write_page",
]
