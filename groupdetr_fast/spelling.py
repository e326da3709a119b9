"""What may have been meant by a name that there is not."""

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean"]


def did_you_mean(name: str, names: Iterable[str], *, otherwise: str = "") -> str:
    """The end of a sentence that says of a name that there is none such, without a full stop.

    Args:
        name: what somebody wrote; upper and lower case are the same.
        names: those that there are.
        otherwise: the end if none of them is similar.
    """
    known = {each.lower(): each for each in names}
    close = difflib.get_close_matches(name.strip().lower(), known, n=1)
    return f": did you mean {known[close[0]]!r}?" if close else otherwise
