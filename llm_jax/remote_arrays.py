"""Orbax in a bucket: a checkpoint is there once its last file is, since no store renames a folder; and S3, which tensorstore knows and Orbax does not.

Used by `checkpoint.py` alone. Of local folders here is only how arrays are cut.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

from orbax.checkpoint import v1 as ocp

from llm_jax.storage import StorageError, is_remote

CUT = 2**20
"""Bytes from which on a part of an array is worth cutting, so that each device that holds the array writes one: each cut is a program to compile"""


@contextlib.contextmanager
def reached(path: Any) -> Iterator[str]:
    """The name of a checkpoint as Orbax takes it, with what Orbax needs to be told set while this lasts."""
    name = os.fspath(path)
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = CUT
    if is_remote(name):
        context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
    if name.startswith("s3://"):
        _teach_s3()
    with context:
        yield name


@functools.cache
def _teach_s3() -> None:
    """Have Orbax open S3 by tensorstore's driver. Orbax 0.12.8 makes the spec of a store in one function, for files and Google's buckets."""
    try:
        from orbax.checkpoint._src.serialization import tensorstore_utils

        made = tensorstore_utils.build_kvstore_tspec
    except (ImportError, AttributeError) as e:
        raise StorageError(f"this version of orbax-checkpoint cannot write to s3:// ({e}): install 0.12.8") from e
    with contextlib.suppress(ValueError):  # what it says of a path that it takes for a relative one
        if "'s3'" in str(made("s3://bucket/path")):
            return

    @functools.wraps(made)
    def build(directory: str, *arguments: Any, **options: Any) -> Any:
        scheme, _, rest = str(directory).partition(":")
        if scheme != "s3":
            return made(directory, *arguments, **options)
        return _of_s3(made(f"gs://{rest.lstrip('/')}", *arguments, **options))

    tensorstore_utils.build_kvstore_tspec = build


def _of_s3(spec: Any) -> Any:
    """A spec with S3's driver in place of that of Google's buckets, at the endpoint that AWS's variables name."""
    if not isinstance(spec, dict):
        return spec
    if spec.get("driver") not in ("gcs", "gcs_grpc"):
        return {name: _of_s3(part) for name, part in spec.items()}
    told = os.environ
    found = {"driver": "s3", "bucket": spec["bucket"], "path": spec["path"]}
    endpoint = told.get("AWS_ENDPOINT_URL_S3") or told.get("AWS_ENDPOINT_URL")
    region = told.get("AWS_REGION") or told.get("AWS_DEFAULT_REGION")
    if endpoint:
        found["endpoint"] = endpoint.rstrip("/")
        region = region or "us-east-1"  # of another server than Amazon's the region cannot be asked for
    if region:
        found["aws_region"] = region
    if told.get("AWS_ACCESS_KEY_ID"):  # else it is looked for in AWS's files and services, loudly
        found["aws_credentials"] = {"type": "environment"}
    return found
