"""The one exception users see: a sentence that says what is wrong and how to mend it."""

from __future__ import annotations


class SaerlError(ValueError):
    """Bad input. The command line prints the message alone and exits with code 2."""
