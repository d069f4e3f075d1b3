"""The page of the look command: for each image what the model attends to, what speaks for its answer, and the like."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from swinv2_train.inspection.attention import Attention
from swinv2_train.inspection.heat import (
    IMAGE_PX,
    TILE_PX,
    activation_picture,
    attention_picture,
    colours_of,
    heads_picture,
    plain_picture,
    query_picture,
)
from swinv2_train.report.html import esc, folded, page_html, section

ATTENTION, ACTIVATION, RECONSTRUCTION, NEIGHBOURS = "Attention", "Grad-CAM", "Reconstruction", "Neighbours"
_QUALITY = 84
_MOST_LISTED = 100
"""Unreadable images by name."""


class Activation(NamedTuple):
    """What speaks for something that the model says."""

    text: str
    """What the model says."""
    stage: int
    """From 0."""
    places: np.ndarray
    """(h', w') over the stage's map, not negative."""


class Neighbour(NamedTuple):
    """An image that is like another."""

    name: str
    similarity: float
    picture: Any
    """An image of Pillow's."""


class Looked(NamedTuple):
    """All that is shown of one image; a part that is empty is left out."""

    name: str
    image: np.ndarray
    """uint8 (H, W, 3): what the model sees of it."""
    patch_px: int
    """Pixels of a token of the first map."""
    queries: Sequence[Sequence[float]]
    attention: Sequence[Sequence[Attention]]
    """By block and query."""
    activations: Sequence[Activation]
    reconstruction: np.ndarray | None
    neighbours: Sequence[Neighbour]


class Heading(NamedTuple):
    """What stands above the images."""

    title: str
    lines: Sequence[str]
    absent: Mapping[str, str]
    """What the page does not show, by its name, and why."""
    unreadable: Mapping[str, str]
    """Images that cannot be read, and why."""
    config: str


def look_page(heading: Heading, images: Sequence[str]) -> str:
    """The page; images: of image_section."""
    lines = "".join(f'<p class="soft">{esc(line)}</p>' for line in heading.lines)
    absent = "".join(f"<li><b>{esc(name)}</b>: {esc(reason)}</li>" for name, reason in heading.absent.items())
    names = list(heading.unreadable.items())
    unreadable = "".join(f"<li>{esc(name)}: {esc(reason)}</li>" for name, reason in names[:_MOST_LISTED])
    if len(names) > _MOST_LISTED:
        unreadable += f"<li>and {len(names) - _MOST_LISTED} more</li>"
    body = [
        f"<header><h1>{esc(heading.title)}</h1>{lines}</header>",
        _legend(),
        section("Images that cannot be read", f"<ul>{unreadable}</ul>" if unreadable else ""),
        *images,
        section("Not on this page", f"<ul>{absent}</ul>" if absent else ""),
        section("Configuration", folded("config.yaml", heading.config)),
    ]
    return page_html(heading.title, "".join(body), _CSS)


def image_section(looked: Looked) -> str:
    """Everything of one image."""
    parts = [
        _part(ACTIVATION, _activations(looked)),
        _part(ATTENTION, _attention(looked)),
        _part(RECONSTRUCTION, _reconstruction(looked)),
        _part(NEIGHBOURS, _neighbours(looked)),
    ]
    return section(looked.name, "".join(parts))


def _part(title: str, body: str) -> str:
    return f"<h3>{esc(title)}</h3>{body}" if body else ""


def _legend() -> str:
    stops = ",".join(f"rgb({','.join(str(round(part)) for part in colours_of(np.array(at / 8)))})" for at in range(9))
    return (
        f'<p class="legend soft"><span>0</span><i style="background:linear-gradient(90deg,{stops})"></i>'
        "<span>the highest of its picture</span></p>"
    )


def _activations(looked: Looked) -> str:
    if not looked.activations:
        return ""
    figures = [_figure(plain_picture(looked.image), "what the model sees")]
    for each in looked.activations:
        picture = activation_picture(looked.image, each.places, looked.patch_px << each.stage)
        nothing = "" if each.places.any() else "; no place speaks for it"
        figures.append(_figure(picture, f"{each.text} (stage {each.stage + 1}{nothing})"))
    return f'<div class="row">{"".join(figures)}</div>'


def _attention(looked: Looked) -> str:
    heads = "".join(
        _figure(
            heads_picture(looked.image, block, _token_px(looked, block[0])),
            f"each head, {_block_text(block[0])}",
            "picture sheet wide",
        )
        for block in looked.attention
    )
    head = "".join(
        f"<th>query {number}<br>{down:.0%} down, {right:.0%} right</th>"
        for number, (down, right) in enumerate(looked.queries, start=1)
    )
    rows = "".join(
        f"<tr><th>{esc(_block_text(block[0]))}</th>{''.join(_cell(looked, each) for each in block)}</tr>"
        for block in looked.attention
    )
    return (
        '<p class="soft small">The mean over the heads, on the part of the image around the window of the query. White '
        "frames what the query, in cyan, can look at; at what is dim it never does.</p>"
        '<div class="wide"><table class="tiles-of">'
        f"<tr><th>{_image(query_picture(looked.image, looked.queries), 'the queries')}</th>{head}</tr>{rows}"
        "</table></div>"
        "<details><summary>Each head: a row for a query, a column for a head</summary>"
        f'<div class="row">{heads}</div></details>'
    )


def _cell(looked: Looked, attention: Attention) -> str:
    mean = attention.weights.mean(dim=0).numpy()
    picture = attention_picture(looked.image, attention, mean, _token_px(looked, attention), TILE_PX)
    return f"<td>{_image(picture, 'attention')}<small>up to {100 * mean.max():.1f} %</small></td>"


def _block_text(attention: Attention) -> str:
    place, grid = attention.place, attention.grid
    windows = f"windows {_by(grid.window)} on {_by(grid.size)} tokens"
    shifted = f", shifted by {_by(grid.shift)}" if grid.shifted else ", not shifted"
    return f"stage {place.stage + 1}, block {place.block + 1}: {windows}{shifted}"


def _by(lengths: Sequence[int]) -> str:
    return "\u00a0x\u00a0".join(map(str, lengths))


def _token_px(looked: Looked, attention: Attention) -> int:
    return looked.patch_px << attention.place.stage


def _reconstruction(looked: Looked) -> str:
    if looked.reconstruction is None:
        return ""
    from PIL import Image

    return _figure(Image.fromarray(looked.reconstruction), "what is hidden is predicted from the rest", "picture wide")


def _neighbours(looked: Looked) -> str:
    figures = [_figure(each.picture, f"{each.similarity:.3f}  {each.name}") for each in looked.neighbours]
    return f'<div class="row small-row">{"".join(figures)}</div>' if figures else ""


def _figure(picture: Any, caption: str, kind: str = "picture") -> str:
    return f'<figure class="{kind}">{_image(picture, caption)}<figcaption>{esc(caption)}</figcaption></figure>'


def _image(picture: Any, text: str) -> str:
    """An image of Pillow's within the page."""
    file = io.BytesIO()
    picture.convert("RGB").save(file, "JPEG", quality=_QUALITY)
    data = base64.b64encode(file.getvalue()).decode()
    width, height = picture.size
    return f'<img src="data:image/jpeg;base64,{data}" width="{width}" height="{height}" alt="{esc(text)}">'


_CSS = f"""
h3{{font-size:15px;margin:18px 0 8px}}
ul{{margin:0;padding-left:20px}}
.legend{{display:flex;gap:8px;align-items:center;font-size:13px;margin-top:14px}}
.legend i{{width:160px;height:10px;border-radius:5px}}
.row{{display:flex;flex-wrap:wrap;gap:14px}}
.row .picture{{max-width:min({IMAGE_PX}px,47%)}}
.row .sheet{{max-width:100%}}
.sheet img{{max-width:none}}
.sheet figcaption{{width:0;min-width:max(100%,170px)}}
.small-row .picture{{width:112px;max-width:112px}}
.picture figcaption{{overflow-wrap:anywhere}}
.tiles-of th{{font-weight:400;max-width:190px;vertical-align:bottom}}
.tiles-of tr+tr th{{vertical-align:top}}
.tiles-of td{{padding:5px;text-align:center}}
.tiles-of img{{display:block;margin:0 auto;border-radius:4px}}
.tiles-of small{{color:var(--soft)}}
"""
