"""Make names that anybody may have chosen (models, files, folders) safe to show. Imports nothing else of Aletheia."""

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MARKDOWN = str.maketrans({char: f"\\{char}" for char in "\\`*[]|~$"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def printable(text: str) -> str:
    """The text with control characters, line breaks, direction marks and broken characters replaced.

    So no name can move a terminal's cursor, reverse the text after it, or make a page's XML invalid.
    """
    return "".join(char if char.isprintable() else _REPLACEMENT for char in text)


def markdown(text: str) -> str:
    """The text escaped for Markdown, table cells included: nothing in it acts as markup or HTML."""
    return printable(text).translate(_MARKDOWN)
