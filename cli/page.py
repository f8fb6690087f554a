"""A page of pictures with captions in one HTML file, which needs nothing beside it."""

import base64
import html
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import NamedTuple

from PIL import Image

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #141418; background: #fff; margin: 2rem auto; max-width: 1200px;
       padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.5rem } p { max-width: 50rem; color: #50505a }
img { max-width: 100%; image-rendering: pixelated } th { text-align: left; font-weight: 600; padding-right: 1rem }
td, th { vertical-align: top }
"""


class Section(NamedTuple):
    """One picture under a heading, with what it shows."""

    heading: str
    text: str
    picture: Image.Image


def page(title: str, facts: Mapping[str, object], sections: Sequence[Section]) -> bytes:
    """The file, in UTF-8."""
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>\n" for name, value in facts.items()
    )
    parts = [f"<h1>{html.escape(title)}</h1>\n<table>\n{rows}</table>\n"]
    for section in sections:
        data = BytesIO()
        section.picture.save(data, "PNG")
        code = base64.b64encode(data.getvalue()).decode("ascii")
        name, text = html.escape(section.heading), html.escape(section.text)
        parts.append(f'<h2>{name}</h2>\n<p>{text}</p>\n<img alt="{name}" src="data:image/png;base64,{code}">\n')
    head = f'<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n'
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n{head}</head>\n<body>\n{"".join(parts)}</body>\n</html>\n'.encode()
    )
