"""The page about an artifact: one HTML file that needs nothing else, and the same as Markdown."""

from .page import Page, write_page

__all__ = ["Page", "write_page"]
