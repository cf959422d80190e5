"""Episodes as HTML: a row a class, its support images, then its queries, each framed and labelled with what it was taken for."""

import base64
import io
from collections.abc import Iterable
from html import escape

import numpy as np
from PIL import Image

from metadiff.report.content import EpisodePicture

# Sides on the page, in CSS pixels: small images grow by whole factors, which keeps their pixels square, large ones shrink.
_AIM, _LARGEST = 60, 72


def episodes(pictures: Iterable[EpisodePicture]) -> str:
    """All of one variant's episodes."""
    return "".join(_episode(picture) for picture in pictures)


def _episode(picture: EpisodePicture) -> str:
    ways, shown = picture.predicted.shape
    right = int((picture.predicted == np.arange(ways)[:, None]).sum())
    title = f"{ways}-way {picture.shot}-shot: {right} of the {ways * shown} queries shown are right"
    rows = "".join(_way(picture, way) for way in range(ways))
    return f'<div class="episode"><h3>{title}</h3><div class="ways">{rows}</div></div>'


def _way(picture: EpisodePicture, way: int) -> str:
    name = picture.class_names[way]
    support = "".join(_image(image, f"support image of {name}") for image in picture.support[way])
    pairs = zip(picture.query[way], picture.predicted[way], strict=True)
    queries = "".join(_query(image, name, picture.class_names[taken_for]) for image, taken_for in pairs)
    return (
        f'<div class="way"><div class="class-name">{_label(name)}</div>'
        f'<div class="support"><span class="caption">support</span>{support}</div>'
        f'<div class="queries"><span class="caption">queries</span>{queries}</div></div>'
    )


def _query(image: np.ndarray, name: str, taken_for: str) -> str:
    # Two classes never share a name, so names tell right from wrong as indices do.
    kind, mark = ("right", "✓") if taken_for == name else ("wrong", "✗")
    shown = _image(image, f"query of {name}, taken for {taken_for}: {kind}")
    caption = f'<figcaption title="{escape(taken_for)}"><b>{mark}</b> {_label(taken_for)}</figcaption>'
    return f'<figure class="query {kind}">{shown}{caption}</figure>'


def _label(name: str) -> str:
    """A class name in a script of either direction, which may be broken where its parts end."""
    return f"<bdi>{escape(name).replace('/', '/<wbr>').replace('_', '_<wbr>')}</bdi>"


def _image(image: np.ndarray, alt: str) -> str:
    side = min(_LARGEST, len(image) * max(1, round(_AIM / len(image))))
    kind = ' class="enlarged"' if side > len(image) else ""
    png = io.BytesIO()
    Image.fromarray(image).save(png, "PNG")
    source = base64.b64encode(png.getvalue()).decode()
    return f'<img{kind} width="{side}" height="{side}" alt="{escape(alt)}" src="data:image/png;base64,{source}">'
