"""Omniglot: 1623 handwritten characters of 50 alphabets, 20 images of 105 x 105 each (Lake et al., Science 2015)."""

import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Literal

import torch
from PIL import Image
from pydantic import Field

from metadiff.config import config
from metadiff.datasets.folders import images_by_class
from metadiff.datasets.source import ImageSource, by_class, disjoint
from metadiff.datasets.tree import FileTree, FolderTree, ZipTree
from metadiff.errors import UserError

EXPECTED = "expected images_background.zip and images_evaluation.zip of github.com/brendenlake/omniglot, or them unpacked, or download=true"
BACKGROUND, EVALUATION = "images_background", "images_evaluation"
TURNS = {0: None, 90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


@config
class Omniglot:
    """Omniglot in a folder, as the two zips of github.com/brendenlake/omniglot (MIT) or unpacked, there or in `omniglot-py/`.

    A class is `Alphabet/characterNN`. Base and val are carved from the background alphabets, novel is the evaluation set.

    Attributes:
        root: the folder.
        download: fetch into `root` what is not there.
        rotations: add each character turned by 90, 180 and 270 degrees as classes of their own, in every split
            (`Alphabet/characterNN/rot90`).
        val_alphabets: number of background alphabets, of 30, that the seed draws for val.
    """

    kind: Literal["omniglot"] = "omniglot"
    root: Path
    download: bool = False
    rotations: bool = False
    val_alphabets: Annotated[int, Field(ge=0, lt=30)] = 5

    def sources(self, seed: int) -> dict[str, ImageSource]:
        """The splits that are there; `seed` draws the alphabets of val. Strokes are black on white.

        Raises:
            UserError: no such folder, no background set in it, a damaged zip, too many alphabets for val, or the download failed.
        """
        root = self.root.expanduser()
        if not root.is_dir() and (root.exists() or not self.download):
            raise UserError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}; {EXPECTED}")
        background = _characters(root, BACKGROUND, self.download)
        alphabets = sorted({_alphabet(name) for name in background})
        if not alphabets:
            raise UserError(f"{root}: no {BACKGROUND}.zip nor {BACKGROUND}/ in it; {EXPECTED}")
        if self.val_alphabets >= len(alphabets):
            raise UserError(f"val_alphabets={self.val_alphabets}: expected fewer than the {len(alphabets)} background alphabets in {root}")
        order = torch.randperm(len(alphabets), generator=torch.Generator().manual_seed(seed)).tolist()
        held_out = {alphabets[i] for i in order[: self.val_alphabets]}
        splits = {
            "base": {name: drawings for name, drawings in background.items() if _alphabet(name) not in held_out},
            "val": {name: drawings for name, drawings in background.items() if _alphabet(name) in held_out},
            "novel": _characters(root, EVALUATION, self.download),
        }
        angles = TURNS if self.rotations else [0]
        sources = {split: by_class(_turned(drawings, angles), _Drawing.open) for split, drawings in splits.items() if drawings}
        return disjoint(sources, str(root))


@dataclass(frozen=True)
class _Drawing:
    """One image, to be turned anticlockwise by `degrees`."""

    tree: FileTree
    path: str
    degrees: int = 0

    def __str__(self) -> str:
        return f"{self.path} turned by {self.degrees} degrees" if self.degrees else self.path

    def open(self) -> Image.Image:
        turn = TURNS[self.degrees]
        image = self.tree.open_image(self.path)
        return image if turn is None else image.transpose(turn)


def _turned(characters: dict[str, list[_Drawing]], angles: Iterable[int]) -> dict[str, list[_Drawing]]:
    return {
        f"{name}/rot{degrees}" if degrees else name: [replace(drawing, degrees=degrees) for drawing in drawings]
        for name, drawings in characters.items()
        for degrees in angles
    }


def _alphabet(character: str) -> str:
    return character.split("/")[0]


def _characters(root: Path, part: str, download: bool) -> dict[str, list[_Drawing]]:
    """The drawings of each character of one of the two published parts; none where it is absent."""
    tree = _find(root, part)
    if tree is None and download:
        _fetch(root, part)
        tree = _find(root, part)
    if tree is None:
        return {}
    top = tree.top(f"{part}/")
    if top is None:
        raise UserError(f"{tree.root}: no {part}/ in it; {EXPECTED}")
    at = f"{top}/{part}"
    return {
        f"{alphabet}/{character}": [_Drawing(tree, path) for path in paths]
        for alphabet in tree.folders(at)
        for character, paths in images_by_class(tree, f"{at}/{alphabet}").items()
    }


def _find(root: Path, part: str) -> FileTree | None:
    """The zip rather than the folder beside it, which may be the remains of an unpacking that was cut off."""
    for folder in (root, root / "omniglot-py"):
        for path in (folder / f"{part}.zip", folder / f"omniglot-{part}.zip"):
            if path.is_file():
                return ZipTree(path)
        if (folder / part).is_dir():
            return FolderTree(folder)
    return None


def _fetch(root: Path, part: str) -> None:
    from torchvision.datasets import Omniglot as Published  # here, because its import takes seconds, in every process
    from torchvision.datasets.utils import download_url

    url = f"{Published.download_url_prefix}/{part}.zip"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as partial:
            download_url(url, partial, md5=Published.zips_md5[part])
            os.replace(Path(partial, f"{part}.zip"), root / f"{part}.zip")
    except (OSError, RuntimeError, HTTPException) as error:
        raise UserError(f"{url}: download failed ({error}); check the network, or put {part}.zip into {root} by other means") from None
