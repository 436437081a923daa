"""Open a data set, in whichever format its files are."""

import os

from pdrop_jax.errors import UserError
from pdrop_jax.paths import is_dir
from pdrop_jax.train.data.sources.files import Format, files_of, format_of
from pdrop_jax.train.data.sources.json_source import JsonSource
from pdrop_jax.train.data.sources.manifest import SUFFIX, check_complete
from pdrop_jax.train.data.sources.packed_source import PackedSource
from pdrop_jax.train.data.sources.parquet_source import ParquetSource
from pdrop_jax.train.data.sources.source import Source, check_images_folder
from pdrop_jax.train.data.sources.tar_source import TarSource

SOURCES: dict[Format, type[Source]] = {
    "JSON": JsonSource,
    "Parquet": ParquetSource,
    "tar": TarSource,
    "ArrayRecord": PackedSource,
}


def open_source(path: str, images: str | None = None) -> Source:
    """The data set at ``path``, see ``files.files_of``.

    Args:
      images: folder that the names of pictures are relative to; None is the folder of the files.

    Raises:
      UserError: there are no files, or none of a known format; a package that reads them is not installed; packed
        shards are incomplete; or ``images`` is not a folder.
    """
    files = files_of(path)
    if is_dir(path) and files[0].endswith(SUFFIX):
        check_complete(path, files)
    kind = SOURCES[format_of(files[0])]
    if kind is PackedSource and path.startswith("s3:"):
        raise UserError(
            f"{path} holds ArrayRecord shards, which are read from a local disk or gs:// only: copy them, or train on "
            "Parquet or tar files"
        )
    images = os.path.dirname(files[0]) or "." if images is None else images
    check_images_folder(images)
    return kind(path, files, images)
