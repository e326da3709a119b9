"""Texts of other people, such as names of categories and files, for the terminal."""

__all__ = ["shown"]


def shown(text: str, limit: int = 300) -> str:
    """A text in which no escape code acts on the terminal, and of which at most ``limit`` characters are left."""
    if len(text) > limit:
        text = text[: limit - 3] + "..."
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
