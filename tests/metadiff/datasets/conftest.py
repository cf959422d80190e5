"""Small layouts of images, and where the real data are."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from metadiff.errors import UserError


@pytest.fixture
def put_images() -> Callable[..., None]:
    """Writes one small image to each path, every one of another grey."""

    def put(root: Path, *paths: str) -> None:
        for shade, path in enumerate(paths):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (6, 5), (shade, shade, shade)).save(root / path)

    return put


@pytest.fixture
def refusal() -> Callable[[Any], str]:
    """The one line with which a data set refuses its input."""

    def refuse(dataset: Any) -> str:
        with pytest.raises(UserError) as caught:
            dataset.sources(seed=0)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refuse


@pytest.fixture
def real_data() -> Path:
    """The folder of real data: METADIFF_DATA, else beside the repository."""
    folder = Path(os.environ.get("METADIFF_DATA") or Path(__file__).parents[4] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}; METADIFF_DATA names another folder")
    return folder
