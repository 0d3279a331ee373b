"""An object store's bucket through obstore: S3, Google Cloud Storage, Azure; its errors in words, without secrets."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from fedmoe.runtime.errors import ExpectedError, RefusedError

Result = TypeVar("Result")

# A request that takes longer has failed: 64 MB at half a megabyte a second.
_REQUEST_SECONDS = 120
_CONNECT_SECONDS = 5
# Within a request obstore tries again what is safe to try again; a whole call is repeated for as long.
_RETRY_SECONDS = 10.0
_CALLS = 3
_PART_BYTES = 16 << 20
_PARTS_AT_ONCE = 4
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")
_STATUS = re.compile(r"status code: (\d{3})")
_CREDENTIALS = (
    "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (S3), GOOGLE_SERVICE_ACCOUNT (gs://), or "
    "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY (az://), with leave to read, write, list and delete."
)


class BlobUrlError(ExpectedError):
    """What `--blobs` names cannot be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class ObjectFacts:
    """What a listing says of an object; `changed` is in seconds since 1970, by the store's clock."""

    key: str
    size: int
    changed: float
    etag: str | None


class Bucket:
    """The objects below a URL such as `s3://bucket/prefix`; credentials and endpoint are read from the environment.

    A failure that lasts is a refusal, `blobs_unavailable`: the store may be well again for the next request.
    """

    def __init__(self, url: str) -> None:
        try:
            import obstore
            from obstore import exceptions
            from obstore.store import from_url
        except ModuleNotFoundError as error:
            raise BlobUrlError(f"{error.name} is not installed; run: pip install 'fedmoe[s3]'") from error
        self.url = url
        self._obstore: Any = obstore
        self._errors: Any = exceptions
        # What is given here replaces every option of obstore's own variables, AWS_ALLOW_HTTP among them.
        options = {
            "timeout": timedelta(seconds=_REQUEST_SECONDS),
            "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
            "allow_http": os.environ.get("AWS_ALLOW_HTTP", "").lower() == "true",
        }
        backoff = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=2)}
        retry = {"max_retries": 3, "retry_timeout": timedelta(seconds=_RETRY_SECONDS), "backoff": backoff}
        try:
            self._store: Any = from_url(url, client_options=options, retry_config=retry)
        except (exceptions.BaseError, ValueError) as error:
            raise BlobUrlError(f"{url} cannot be used ({_kind(error)}); {_CREDENTIALS}") from None

    def create(self, key: str, data: memoryview | bytes) -> bool:
        """Store an object in one request, if there is none of that name: all of it or nothing; whether it did.

        The bytes are sent from where they are. False is also the answer where two stored it at once, and one has to
        look which of them did.
        """
        try:
            self._put(key, data, mode="create", use_multipart=False)
        except self._errors.AlreadyExistsError:
            return False
        return True

    def put(self, key: str, data: memoryview | bytes) -> None:
        """Store an object in one request, in the place of one that may be there."""
        self._put(key, data, use_multipart=False)

    def put_in_parts(self, key: str, data: memoryview) -> None:
        """Store a large object in parts; it appears whole or not at all."""
        self._put(key, data, use_multipart=True, chunk_size=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE)

    def get(self, key: str) -> bytes | None:
        """An object's bytes; None where there is none."""
        return self._unless_missing(lambda: bytes(self._obstore.get(self._store, key).bytes()))

    def facts(self, key: str) -> ObjectFacts | None:
        """What is known of an object; None where there is none."""
        return self._unless_missing(lambda: _facts(self._obstore.head(self._store, key)))

    def copy(self, key: str, to: str) -> bool:
        """Copy an object within the bucket, in the place of one that may be there; whether there was one to copy."""
        return self._unless_missing(lambda: self._obstore.copy(self._store, key, to) or True) is not None

    def delete(self, *keys: str) -> None:
        """Delete objects, many at once; those that are missing already are fine."""
        if not keys:
            return
        try:
            self._call(lambda: self._obstore.delete(self._store, list(keys)))
        except FileNotFoundError:  # only S3 lets them be, and the rest may still be there
            for key in keys if len(keys) > 1 else ():
                self.delete(key)

    def list(self, prefix: str) -> Iterator[ObjectFacts]:
        """Everything below a part of the path, a page at a time."""
        pages = iter(self._obstore.list(self._store, prefix=prefix))
        # Not tried again: after an error the pages would end as if that were all.
        while (page := self._call(lambda: next(pages, None), calls=1)) is not None:
            yield from map(_facts, page)

    def _put(self, key: str, data: memoryview | bytes, **options: Any) -> None:
        try:
            self._call(lambda: self._obstore.put(self._store, key, data, **options))
        except FileNotFoundError as error:  # what is written into is missing
            raise self._refusal(error) from None

    def _unless_missing(self, call: Callable[[], Result]) -> Result | None:
        try:
            return self._call(call)
        except FileNotFoundError:
            return None

    def _call(self, call: Callable[[], Result], calls: int = _CALLS) -> Result:
        """The result of a call that may be repeated; raises FileNotFoundError, AlreadyExistsError and RefusedError."""
        began = time.monotonic()
        for attempt in range(1, calls + 1):
            try:
                return call()
            except self._errors.AlreadyExistsError:
                raise
            except FileNotFoundError as error:
                if _kind(error) == _NO_BUCKET:
                    raise self._refusal(error) from None
                raise
            except (self._errors.BaseError, OSError) as error:
                lasting = not isinstance(error, self._errors.GenericError) or _lasts(error)
                if lasting or attempt == calls or time.monotonic() - began > _RETRY_SECONDS:
                    raise self._refusal(error) from None
            time.sleep(0.1 * 4**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _refusal(self, error: Exception) -> RefusedError:
        """What an error means, in words: obstore's own text repeats what was signed, and the name of the key."""
        kind, advice = _kind(error), "Nothing was stored; retry later."
        if kind in _ADVICE:
            advice = _ADVICE[kind]
        return RefusedError("blobs_unavailable", f"the object store {self.url} failed: {kind}.", advice)


_NO_CREDENTIALS, _NO_BUCKET, _DENIED = "no credentials were found", "there is no such bucket", "it denies access"
_PLAIN_HTTP, _SILENT = "its endpoint is http:// without TLS", "it does not answer"
_ADVICE = {
    _NO_CREDENTIALS: _CREDENTIALS,
    _NO_BUCKET: "Make the bucket, or correct --blobs.",
    _DENIED: f"The credentials are wrong or may do too little. {_CREDENTIALS}",
    _PLAIN_HTTP: "Use https://, or set AWS_ALLOW_HTTP=true for a store on this machine.",
    _SILENT: "Check the network, AWS_ENDPOINT_URL and that it runs; nothing was stored, retry later.",
}
_DENYING = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "Forbidden"}


def _kind(error: Exception) -> str:
    """What went wrong, in words of our own, or as the store's code and status."""
    text = str(error)
    code, status = _CODE.search(text), _STATUS.search(text)
    if "/latest/api/token" in text or "/meta-data/" in text or "metadata.google" in text or "MissingAccount" in text:
        return _NO_CREDENTIALS
    if any(name in text for name in ("NoSuchBucket", "ContainerNotFound", "bucket does not exist")):
        return _NO_BUCKET
    if (code and code[1] in _DENYING) or (status and status[1] in ("401", "403")):
        return _DENIED
    if "BadScheme" in text:
        return _PLAIN_HTTP
    if code or status:
        return f"{code[1] if code else 'an answer'} with status {status[1] if status else 'unknown'}"
    return _SILENT if "HTTP error" in text else type(error).__name__


def _lasts(error: Exception) -> bool:
    """Whether a repetition would fail the same way: the store has answered, and not that it is overwhelmed."""
    status = _STATUS.search(str(error))
    return _kind(error) in (_NO_CREDENTIALS, _NO_BUCKET, _DENIED, _PLAIN_HTTP) or bool(
        status and not status[1].startswith("5") and status[1] != "429"
    )


def _facts(meta: Any) -> ObjectFacts:
    return ObjectFacts(meta["path"], meta["size"], meta["last_modified"].timestamp(), meta["e_tag"])
