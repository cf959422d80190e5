import numpy as np
import pytest
from PIL import Image

from metadiff.datasets.source import by_class, disjoint
from metadiff.errors import UserError


def test_images_are_listed_class_after_class_in_sorted_order():
    source = by_class({"b": [3, 4], "a": [7], "c": [1, 0]}, lambda shade: Image.new("RGB", (1, 1), (shade, 0, 0)), name="image {}".format)
    assert source.classes == ["a", "b", "c"]
    assert source.labels.tolist() == [0, 1, 1, 2, 2]
    assert source.labels.dtype == np.int64
    assert source.names == ["image 7", "image 3", "image 4", "image 1", "image 0"]
    assert [source.open(i).getpixel((0, 0)) for i in range(len(source))] == [(shade, 0, 0) for shade in (7, 3, 4, 1, 0)]


def test_a_class_in_two_splits_is_named():
    def split(*classes: str):
        return by_class({name: [0] for name in classes}, lambda _: Image.new("RGB", (1, 1)))

    apart = {"base": split("a", "b"), "novel": split("c")}
    assert disjoint(apart, "here") == apart
    with pytest.raises(UserError, match=r"^here: class b \(and 1 more\) is in both base and novel; .* take it out"):
        disjoint({"base": split("a", "b", "c"), "val": split("d"), "novel": split("b", "c")}, "here")
