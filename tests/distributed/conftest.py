"""Places for stores: a folder, moto's S3 and an emulator's Cloud Storage, each in a thread."""

import functools
import importlib.util
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.distributed.stores import Place, Service, make_bucket

if TYPE_CHECKING:
    from tests.distributed.gcs_service import GcsService


@pytest.fixture(scope="module")
def service() -> Iterator[tuple[Service, str]]:
    """moto's S3 on a free port, and its address."""
    if importlib.util.find_spec("moto") is None:
        pytest.skip("moto is not installed: pip install 'moto[server]'")
    import botocore.session
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    # Each session would parse botocore's megabytes of JSON anew.
    create_loader = botocore.session.create_loader
    botocore.session.create_loader = functools.cache(create_loader)
    service = Service(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, service, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield service, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()
    botocore.session.create_loader = create_loader


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials that moto takes, and none of the user's own settings."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def bucket(service: tuple[Service, str], aws: None, request: pytest.FixtureRequest) -> Place:
    service[0].faults.clear()
    make_bucket(service[1], "targets")
    return Place(f"s3://targets/{_prefix(request)}/fits", service[1])


@pytest.fixture(scope="module")
def google() -> Iterator["GcsService"]:
    pytest.importorskip("gcp_storage_emulator", reason="pip install gcp-storage-emulator")
    with warnings.catch_warnings():
        # Google's client would like to be installed with gRPC's error messages.
        warnings.simplefilter("ignore", ImportWarning)
        pytest.importorskip("google.cloud.storage", reason="pip install 'metadiff[gcs]'")
    from tests.distributed.gcs_service import GcsService

    service = GcsService()
    yield service
    service.close()


@pytest.fixture
def google_bucket(google: "GcsService", monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Place:
    google.faults.clear()
    google.make_bucket("targets")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", google.url)
    return Place(f"gs://targets/{_prefix(request)}/fits")


@pytest.fixture(params=["folder", "s3", "gs"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return Place(str(tmp_path / "deep" / "store"))
    return request.getfixturevalue({"s3": "bucket", "gs": "google_bucket"}[request.param])


def _prefix(request: pytest.FixtureRequest) -> str:
    return "".join(letter for letter in request.node.name if letter.isalnum())
