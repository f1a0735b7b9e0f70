"""The command line."""

from scap_hub.cli.app import main
from scap_hub.cli.output import show_report

__all__ = ["main", "show_report"]
