"""What somebody may have meant who misspelt a word."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from ..typed import Final

# The words may be an image's: comparing two takes the product of their lengths.
_LONGEST: Final = 64  # characters
_MOST: Final = 1000  # words


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most like it without being it, if one is alike at all."""
    if len(word) > _LONGEST:
        return None
    import difflib

    candidates = [k for k in islice(known, _MOST) if len(k) <= _LONGEST and k != word]
    folded = word.casefold()  # no letter of NIGHTLY is one of nightly's
    if same := next((k for k in candidates if k.casefold() == folded), None):
        return same
    return next(iter(difflib.get_close_matches(word, candidates, 1)), None)
