"""The page of a run: one HTML file that needs no network, made of the documents in a saved folder."""

from scap_hub.page.folder import PAGE, REPORT, page_of, to_publish, write_page
from scap_hub.page.html import render

__all__ = ["PAGE", "REPORT", "page_of", "render", "to_publish", "write_page"]
