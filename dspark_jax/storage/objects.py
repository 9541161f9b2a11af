"""Objects of a store, by place: read, write, write on a condition, list, remove; every failure is one sentence.

An object appears whole or not at all, and is seen by every later read and listing: S3 and Google's store promise both.
They have no rename and no append. Requests that fail with 5xx, a timeout or a broken connection are repeated with
growing pauses, for `patience()` seconds in all.
"""

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from dspark_jax.errors import UserError
from dspark_jax.files import file_hash
from dspark_jax.storage.places import Place, seconds_of

T = TypeVar("T")
PATIENCE = "DSPARK_STORE_SECONDS"
PART_BYTES = 16 << 20
"""Bytes of one request of a large object."""
_TRANSFERS = 4
_CREDENTIALS = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken")
_METADATA_SERVERS = ("169.254.169.254", "metadata.google.internal")


class Missing(UserError):
    """There is no such object, or no such bucket."""


class Unconditional(UserError):
    """The store has no writes on a condition."""


@dataclass(frozen=True)
class Found:
    """An object as it was seen: its bytes, the tag of its content, and what a write on the condition of it sends."""

    bytes: int
    tag: str
    version: str | None = None

    @property
    def condition(self) -> dict[str, str]:
        # Stores differ in which of the two they compare; without a version there is no key.
        return {"e_tag": self.tag} | ({"version": self.version} if self.version else {})


def patience() -> float:
    """Seconds for which a request is repeated: $DSPARK_STORE_SECONDS, else 120."""
    return seconds_of(PATIENCE, 120)


# -- Reading ---------------------------------------------------------------------------------------------------------


def find(place: Place) -> Found | None:
    """The object at a place; None where there is none."""
    # Asked for, not listed: one request, and a missing object is an answer.
    with suppress(Missing), _reported(place, "found"):
        return _found(_library(place).head(_store(place), place.key))
    return None


def read(place: Place, span: tuple[int, int] | None = None, seen: Found | None = None) -> bytes:
    """The bytes of an object.

    Args:
        place: of the object.
        span: the first byte and the end; None: all of them.
        seen: refuse another content than this one.
    Raises:
        Missing: there is no such object.
        UserError: it has changed since it was seen, or can't be read.
    """
    options = ({"range": span} if span else {}) | ({"if_match": seen.tag} if seen else {})
    # The library repeats requests, not bodies that break off: hence the whole call again.
    with _reported(place, "read"):
        return _repeated(lambda: bytes(_library(place).get(_store(place), place.key, options=options).bytes()))


def listing(place: Place) -> dict[str, Found]:
    """All objects below a place, by their names relative to it, in order."""
    names: dict[str, Found] = {}
    # Page by page, as the store gives them: a cache may have a hundred thousand shards.
    with _reported(place, "listed"):
        for chunk in _library(place).list(_store(place), prefix=place.key or None):
            for entry in chunk:
                names[entry["path"][len(place.key) :].lstrip("/")] = _found(entry)

    return dict(sorted(names.items()))


def download(place: Place, path: Path, seen: Found, xxh3: str | None = None) -> None:
    """Puts an object's bytes into a file, which appears whole or not at all.

    Args:
        place: of the object.
        path: the file; its folder must exist.
        seen: the object as it was listed; another content is refused.
        xxh3: the hash that the bytes must have; None: the store's own checks count.
    Raises:
        UserError: as `read`, or the hash differs.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    spans = [(at, min(at + PART_BYTES, seen.bytes)) for at in range(0, seen.bytes, PART_BYTES)]
    try:
        with open(temporary, "wb") as file, ThreadPoolExecutor(_TRANSFERS) as pool:
            # Each part goes to its own offset, so none waits in memory for the ones before it.
            for _ in pool.map(lambda span: os.pwrite(file.fileno(), read(place, span, seen), span[0]), spans):
                pass
        if xxh3 is not None and (found := file_hash(temporary)) != xxh3:
            raise UserError(f"{place} is damaged: its hash is {found[:12]}, {xxh3[:12]} was expected; restore it.")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# -- Writing ---------------------------------------------------------------------------------------------------------


def write(place: Place, data: bytes | Iterable[Any]) -> Found:
    """Replaces an object by bytes, or by the buffers that an iterable yields, sent in parts as they come."""
    with _reported(place, "written"):
        options = {} if isinstance(data, bytes) else {"chunk_size": PART_BYTES, "max_concurrency": _TRANSFERS}
        return _put(place, data, **options)


def upload(path: Path, place: Place) -> Found:
    """Replaces an object by the bytes that a file has now."""
    # Read at once where it is small: a log that grows meanwhile is sent as it was.
    if path.stat().st_size <= PART_BYTES:
        return write(place, path.read_bytes())
    with open(path, "rb") as file:
        return write(place, iter(lambda: file.read(PART_BYTES), b""))


def create(place: Place, data: bytes) -> Found | None:
    """Writes an object where there is none; None where there is one. Unconditional where a store can't promise it."""
    return _on_condition(place, data, "create")


def replace(place: Place, data: bytes, seen: Found) -> Found | None:
    """Replaces an object that is still as it was seen; None where it is not. Unconditional as `create`."""
    return _on_condition(place, data, seen.condition)


def remove(places: Sequence[Place]) -> None:
    """Removes objects; those that are not there count as removed."""
    # One by one and in order: callers remove what makes others whole first.
    for place in places:
        with suppress(Missing), _reported(place, "removed"):
            _library(place).delete(_store(place), place.key)


def _on_condition(place: Place, data: bytes, mode: Any) -> Found | None:
    errors = _library(place).exceptions
    try:
        with _reported(place, "written", errors.AlreadyExistsError, errors.PreconditionError):
            try:
                return _put(place, data, mode=mode)
            except (errors.NotSupportedError, errors.GenericError) as error:
                if isinstance(error, errors.GenericError) and "501 Not Implemented" not in str(error):
                    raise
                raise Unconditional(f"{place} is in a store without conditional writes.") from None
    except (errors.AlreadyExistsError, errors.PreconditionError):
        # Of a write whose answer was lost and that was sent again, the content is ours.
        seen = find(place)
        return seen if seen is not None and _same(place, data) else None


def _same(place: Place, data: bytes) -> bool:
    with suppress(UserError):
        return read(place) == data
    return False


def _put(place: Place, data: Any, **options: Any) -> Found:
    result = _library(place).put(_store(place), place.key, data, **options)
    return Found(len(data) if isinstance(data, bytes) else -1, result["e_tag"] or "", result["version"])


# -- The library -----------------------------------------------------------------------------------------------------


def _library(place: Place) -> Any:
    # Imported late, and so at all only by those who have files in a store.
    try:
        import obstore
    except ImportError:
        raise UserError(
            f"{place} is read and written by a library that is not installed; pip install 'dspark-jax[{place.scheme}]'."
        ) from None
    return obstore


@cache
def _opened(scheme: str, bucket: str, seconds: float, environment: tuple[str | None, ...]) -> Any:
    from obstore.store import GCSStore, S3Store

    pauses = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=10), "base": 2}
    # The time bounds the repetitions; their number only follows from it.
    retry: Any = {"max_retries": 1000, "backoff": pauses, "retry_timeout": timedelta(seconds=seconds)}
    client: Any = {"timeout": timedelta(seconds=max(seconds / 2, 1)), "allow_http": True}
    if scheme == "gs":
        return GCSStore(bucket, client_options=client, retry_config=retry)
    return S3Store(bucket, client_options=client, retry_config=retry, credential_provider=_profile())


def _store(place: Place) -> Any:
    # Part of the cache's key: a test, or a program that sets them late, gets the store of its own variables.
    names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "GOOGLE_APPLICATION_CREDENTIALS")
    return _opened(place.scheme, place.bucket, patience(), tuple(os.environ.get(name) for name in names))


def _profile() -> Any:
    """Credentials of ~/.aws, single sign-on or the machine's role; None where the environment has keys or says none."""
    if os.environ.get("AWS_ACCESS_KEY_ID") or os.environ.get("AWS_SKIP_SIGNATURE"):
        return None
    from obstore.auth.boto3 import Boto3CredentialProvider

    try:
        return Boto3CredentialProvider()
    except Exception as error:  # boto3 raises what its many sources raise
        raise UserError(f"s3:// needs credentials, and none were found ({_first_line(error)}); {_CURE}") from None


_CURE = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or log in with the cloud's own program."


def _found(entry: Any) -> Found:
    return Found(entry["size"], entry["e_tag"] or "", entry["version"])


def _repeated(call: Callable[[], T]) -> T:
    """Calls again, with growing pauses, while the library reports a fault that may pass."""
    from obstore.exceptions import GenericError

    began, pause = time.monotonic(), 0.2
    while True:
        try:
            return call()
        except GenericError as error:
            # An answer of the store has been repeated by the library already; a body that broke off has not.
            if "Server returned non-2xx" in str(error) or time.monotonic() - began + pause > patience():
                raise
            time.sleep(pause)
            pause = min(2 * pause, 10.0)


@contextmanager
def _reported(place: Place, done: str, *passed: type[Exception]) -> Iterator[None]:
    """Turns the library's errors into sentences, but for those `passed`."""
    errors = _library(place).exceptions
    try:
        yield
    except passed:
        raise
    except FileNotFoundError as error:
        raise Missing(_sentence(place, done, error)) from None
    except errors.BaseError as error:
        if "NoSuchBucket" in str(error):
            raise Missing(_sentence(place, done, error)) from None
        raise UserError(_sentence(place, done, error)) from None


def _sentence(place: Place, done: str, error: Exception) -> str:
    text = str(error)
    code = re.search(r"<Code>(\w+)</Code>", text)
    bucket = Place(place.scheme, place.bucket)
    if code and code[1] == "NoSuchBucket":
        return f"The bucket {bucket} does not exist; create it, or correct the path {place}."
    if isinstance(error, FileNotFoundError):
        return f"{place} does not exist; correct the path."

    # Without keys the library asks the machine for them, and clouds' machines alone answer.
    if any(server in text for server in _METADATA_SERVERS):
        return f"{place} could not be {done}: there are no credentials; {_CURE}"
    if type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError") or (code and code[1] in _CREDENTIALS):
        said = code[1] if code else "access denied"
        return f"{place} could not be {done}: the credentials do not allow it ({said}); give others, or the right."
    if type(error).__name__ == "PreconditionError":
        return f"{place} has changed while it was read; run again once its writer has ended."

    # What is left has been repeated for as long as patience allowed.
    status = re.search(r"status code: (\d+[^:\n]*)", text)
    reason = status[1] if status else "no connection" if "error sending request" in text else _first_line(error)
    return (
        f"{place} could not be {done} ({reason}) within {patience():g} s; check the network, AWS_ENDPOINT_URL and the "
        "store, and run again."
    )


def _first_line(error: Exception) -> str:
    return " ".join(str(error).partition("\n\nDebug source")[0].split())[:200].rstrip(".")
