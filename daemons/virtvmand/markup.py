"""XML that we write from nothing: elements as text, two spaces a level, with libvirt's quotes. Pure."""

from virtvmand.xmltree import attribute, escaped


def tag(name: str, /, *children: str, **attributes: object) -> str:
    """An element of elements; children that are empty texts are left out."""
    inner = [f"  {line}" for child in children if child for line in child.splitlines()]
    return (
        "\n".join([f"{_start(name, attributes)}>", *inner, f"</{name}>"]) if inner else f"{_start(name, attributes)}/>"
    )


def leaf(name: str, text: object, /, **attributes: object) -> str:
    """An element of text, in one line; nothing where the text is empty. What XML can't hold is left out."""
    words = plain(str(text))
    return f"{_start(name, attributes)}>{escaped(words)}</{name}>" if words else ""


def plain(text: str) -> str:
    """Words with a space between them, without control characters: firmware may say anything."""
    return "".join(one for one in " ".join(text.split()) if one.isprintable())


def _start(name: str, attributes: dict[str, object]) -> str:
    return " ".join([f"<{name}", *(f"{key}='{attribute(str(value))}'" for key, value in attributes.items())])
