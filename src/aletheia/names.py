"""Names that anybody may have chosen (models, files, folders), made fit to be shown. Imports nothing of ours."""

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MARKDOWN = str.maketrans({char: f"\\{char}" for char in "\\`*[]|~$"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def printable(text: str) -> str:
    """The text with control characters, line ends, marks of direction and broken characters replaced.

    So no name can move a terminal's cursor, reverse what follows it, or make a page's XML invalid.
    """
    return "".join(char if char.isprintable() else _REPLACEMENT for char in text)


def markdown(text: str) -> str:
    """The text as it reads in Markdown, a table's cell included: nothing in it is markup or HTML."""
    return printable(text).translate(_MARKDOWN)
