"""What Google's service refuses, and when it fails."""

import socket
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from distributed import gcs
from distributed.blobs import StoreUnavailable, open_blobs
from distributed.gcs import GcsBlobs
from distributed.identity import IDENTITY
from distributed.store import TargetStore
from metadiff.errors import UserError
from tests.distributed.stores import BLOCKS, MINE, Place, commit, content, filled, name, same

if TYPE_CHECKING:
    from tests.distributed.gcs_service import GcsService


def test_a_bucket_that_does_not_exist(google_bucket: Place) -> None:
    with pytest.raises(UserError, match=r"^store gs://nowhere/fits: refused \(404 .*\); create the bucket, or set store\.url"):
        TargetStore.open("gs://nowhere/fits", MINE)


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        ("403", r"these credentials need storage\.objects\.list"),
        ("400", r"check store\.url and store\.endpoint_url"),
    ],
)
def test_what_the_service_refuses(google_bucket: Place, google: "GcsService", status: str, advice: str) -> None:
    google.faults.append(status)
    with pytest.raises(UserError, match=rf"^store gs://.*refused \({status} .*so it is\); {advice}[^\n]*$") as caught:
        google_bucket.store()
    assert not isinstance(caught.value, StoreUnavailable)


def test_refused_credentials(google_bucket: Place, google: "GcsService") -> None:
    google.faults.append("401")
    with pytest.raises(UserError, match=r"Anonymous credentials cannot be refreshed; check the credentials \(GOOGLE_APPLICATION_CRED"):
        google_bucket.store()


def test_no_credentials(google_bucket: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere.json")
    with pytest.raises(UserError, match=r"^store gs://targets/fits: File /nowhere\.json was not found; check the credentials \(GOOGLE"):
        open_blobs("gs://targets/fits")


def test_an_endpoint_where_nothing_listens(google_bucket: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gcs, "_PROBE_SECONDS", 1)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(StoreUnavailable, match=r"Connection refused.*; check the network, store\.endpoint_url and STORAGE_EMULATOR_H"):
            google_bucket.store()


def test_an_endpoint_that_is_none(google_bucket: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "nonsense")
    with pytest.raises(UserError, match=r"Invalid URL .*; check store\.endpoint_url and STORAGE_EMULATOR_HOST"):
        google_bucket.store()


def test_without_the_client(google_bucket: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "google.cloud.storage.retry", None)
    with pytest.raises(UserError, match=r"google-cloud-storage is not installed; pip install 'metadiff\[gcs\]'"):
        open_blobs("gs://targets/fits")


def test_passing_failures_are_waited_out(google_bucket: Place, google: "GcsService") -> None:
    store = google_bucket.store()
    google.faults.extend(["503", "500", "429"])
    assert commit(store, 0)
    google.faults.extend(["500", "", "503"])
    assert same(store.read(0), 0)
    assert store.has(0)


def test_a_connection_that_breaks_loses_nothing(google_bucket: Place, google: "GcsService") -> None:
    store = google_bucket.store()
    google.faults.append("lost")
    assert not commit(store, 0)  # The repeated request finds the first one's object.
    google.faults.extend(["lost", "half"])
    assert same(store.read(0), 0)


def test_lasting_failures_are_told(google_bucket: Place, google: "GcsService", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gcs, "_PATIENCE_SECONDS", 0.1)
    store = google_bucket.store()
    google.faults.extend(["503"] * 20)
    with pytest.raises(StoreUnavailable, match=r"^store gs://[^\n]* start again (later )?to go on$"):
        commit(store, 0)
    google.faults.clear()
    assert store.missing(3) == [0, 1, 2]
    assert commit(store, 0)


def test_of_two_large_uploads_the_first_wins(google_bucket: Place) -> None:
    blobs = google_bucket.store().blobs
    first, second = (bytes([letter]) * (9 * 2**20) for letter in b"ab")
    assert blobs.put_new("large", first)
    assert not blobs.put_new("large", second)
    assert blobs.get("large") == first


def test_an_upload_in_pieces_outlasts_failures(google_bucket: Place, google: "GcsService", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gcs, "_PIECE_BYTES", 2**18)
    blobs, content = google_bucket.store().blobs, np.random.default_rng(0).bytes(10**6)
    google.faults.extend(["503", "", "503", "lost", "", "503"])
    with blobs.writing("array", len(content)) as write:
        for start in range(0, len(content), 70_000):
            write(content[start : start + 70_000])
    assert blobs.get("array") == content
    assert not google.faults


def test_a_whole_bucket_can_be_the_store(google_bucket: Place, google: "GcsService") -> None:
    google.make_bucket("alone")
    store = filled(TargetStore.open("gs://alone", MINE))
    GcsBlobs("alone", "deeper", None).put(name(7), content(store, 0))
    assert set(store.blobs.sizes()) == {IDENTITY, *map(name, BLOCKS)}
