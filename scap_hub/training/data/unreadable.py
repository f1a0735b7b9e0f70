"""Images that cannot be read: how many may be, and what is said when there are more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scap_hub.errors import DataError

_SHARE, _MOST = 0.001, 100
"""What may be unreadable where nothing is set: that share, and that many images at most."""
_SHOWN = 10


@dataclass(frozen=True)
class Tolerance:
    """How many images may be unreadable.

    Attributes:
        share: Of the images; None for 0.1 %, and at most 100 images.
    """

    share: float | None = None

    def of(self, images: int | None) -> int:
        """The number for so many images; of a stream that does not say how many it has, 100, or none if `share` is 0.

        Args:
            images: How many there are; None where it is unknown.
        """
        if images is None:
            return 0 if self.share == 0 else _MOST
        return min(_MOST, int(_SHARE * images)) if self.share is None else int(self.share * images + 1e-9)


class TooManyUnreadable(DataError):
    """Images that cannot be read, named."""

    @classmethod
    def of(cls, where: str, names: Sequence[str], allowed: int) -> TooManyUnreadable:
        """The error for the images of a split.

        Args:
            where: The split in words.
            names: What is known of each.
            allowed: How many may be unreadable.
        """
        subject = "an image" if len(names) == 1 else f"{len(names)} images"
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        return cls(
            f"{subject} of {where} cannot be read: {'; '.join(names[:_SHOWN])}{more}; repair or remove "
            f"{'it' if len(names) == 1 else 'them'}, or raise data.max_broken, which allows {allowed}"
        )
