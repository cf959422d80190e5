"""What the service refuses, and when it fails."""

import socket
import sys

import pytest

from distributed import s3
from distributed.blobs import open_blobs
from distributed.identity import IDENTITY
from distributed.s3 import S3Blobs, StoreUnavailable
from distributed.store import TargetStore
from metadiff.errors import UserError
from tests.distributed.stores import BLOCKS, MINE, Place, Service, commit, filled, make_bucket, name, same


def test_a_bucket_that_does_not_exist(bucket: Place) -> None:
    with pytest.raises(UserError, match=r"^store s3://nowhere/fits: refused \(NoSuchBucket: .*\); create the bucket, or set store\.url"):
        TargetStore.open("s3://nowhere/fits", MINE, bucket.endpoint_url)


def test_a_bucket_that_cannot_exist(bucket: Place) -> None:
    with pytest.raises(UserError, match=r"^store s3://No_Bucket!/fits: .*Invalid bucket name[^\n]*$"):
        TargetStore.open("s3://No_Bucket!/fits", MINE, bucket.endpoint_url)


def test_wrong_credentials(bucket: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from moto import settings

    monkeypatch.setattr(settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)
    with pytest.raises(UserError, match=r"refused \(InvalidAccessKeyId: .*\); check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        bucket.store()


@pytest.mark.parametrize(
    ("answer", "advice"),
    [
        ("403 SignatureDoesNotMatch", "check AWS_ACCESS_KEY_ID"),
        ("400 ExpiredToken", "check AWS_ACCESS_KEY_ID"),
        ("403 AccessDenied", "these credentials need s3:ListBucket"),
        ("403 RequestTimeTooSkewed", "set this machine's clock"),
        ("400 AuthorizationHeaderMalformed", "set AWS_DEFAULT_REGION"),
        ("400 IllegalLocationConstraintException", "set AWS_DEFAULT_REGION"),
        ("400 NotHeardOf", r"check store\.url and store\.endpoint_url"),
    ],
)
def test_what_the_service_refuses(bucket: Place, service: tuple[Service, str], answer: str, advice: str) -> None:
    service[0].faults.extend([answer] * 5)
    with pytest.raises(UserError, match=rf"refused \({answer.split()[1]}: so it is\); {advice}") as caught:
        bucket.store()
    assert not isinstance(caught.value, StoreUnavailable)


def test_no_credentials(bucket: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    with pytest.raises(UserError, match=r"^store s3://targets/.*: Unable to locate credentials; check AWS_\* variables"):
        bucket.store()


def test_an_endpoint_where_nothing_listens(aws: None) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(StoreUnavailable, match=rf'Could not connect to the endpoint URL: "{address}.*; check the network, store\.endp'):
            TargetStore.open("s3://targets/fits", MINE, address)


def test_an_endpoint_that_is_none(aws: None) -> None:
    with pytest.raises(UserError, match=r"Invalid endpoint: nonsense; check AWS_\* variables and store\.endpoint_url"):
        TargetStore.open("s3://targets/fits", MINE, "nonsense")


def test_without_boto3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(UserError, match=r"boto3 is not installed; pip install 'metadiff\[s3\]'"):
        open_blobs("s3://targets/fits")


def test_passing_failures_are_waited_out(bucket: Place, service: tuple[Service, str]) -> None:
    store = bucket.store()
    service[0].faults.extend(["503 SlowDown", "500 InternalError"])
    assert commit(store, 0)
    service[0].faults.extend(["409 ConditionalRequestConflict"])
    assert commit(store, 1)
    service[0].faults.extend(["500 InternalError"])
    assert same(store.read(0), 0)


def test_a_connection_that_breaks_loses_nothing(bucket: Place, service: tuple[Service, str]) -> None:
    store = bucket.store()
    service[0].faults.append("lost")
    assert not commit(store, 0)  # The repeated request finds the first one's object.
    service[0].faults.extend(["lost", "half"])
    assert same(store.read(0), 0)


def test_lasting_failures_are_told(bucket: Place, service: tuple[Service, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_TRIES", 2)
    store = bucket.store()
    service[0].faults.extend(["503 SlowDown"] * 2)
    with pytest.raises(StoreUnavailable, match=r"the service fails \(SlowDown so it is\); start again later to go on"):
        commit(store, 0)
    assert store.missing(3) == [0, 1, 2]
    assert commit(store, 0)
    for fault in ("lost", "half"):
        service[0].faults.extend([fault] * 2)
        with pytest.raises(StoreUnavailable, match=r"; check the network, .* what is stored stays, start again to go on"):
            store.read(0)
    assert same(store.read(0), 0)


def test_a_long_list_comes_in_pages(bucket: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(bucket.store())
    S3Blobs("targets", f"{bucket.url.removeprefix('s3://targets/')}/deeper", bucket.endpoint_url).put("block", b"not ours")
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "2")
    assert set(store.blobs.sizes()) == {IDENTITY, *map(name, BLOCKS)}


def test_a_whole_bucket_can_be_the_store(bucket: Place) -> None:
    assert bucket.endpoint_url
    make_bucket(bucket.endpoint_url, "alone")
    store = filled(TargetStore.open("s3://alone", MINE, bucket.endpoint_url))
    assert store.missing(3) == []
    assert set(store.blobs.sizes()) == {IDENTITY, *map(name, BLOCKS)}
