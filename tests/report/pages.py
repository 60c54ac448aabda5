"""What a page holds, as a parser sees it."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

_VOID = {"br", "hr", "img", "input", "link", "meta", "wbr"}
_SVG = {"path", "rect", "use", "line", "circle", "image", "polyline"}


@dataclass
class Element:
    """One element: its attributes, its children, the text in it."""

    tag: str
    attributes: dict[str, str]
    children: list["Element"] = field(default_factory=list)
    text: str = ""

    def all(self, tag: str) -> list["Element"]:
        """Elements of a name inside it."""
        matches = [child for child in self.children if child.tag == tag]
        return matches + [inner for child in self.children for inner in child.all(tag)]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag, attrs):
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in _VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.open[-1].children.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element.text += data


def read_page(html: str) -> Element:
    """Read a page; elements that are not closed in order are an error."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    assert [element.tag for element in reader.open] == [""], "elements are left open"
    return reader.root


def marks(svg: Element) -> int:
    """Things that a drawing draws."""
    return sum(len(svg.all(tag)) for tag in _SVG)
