"""The folder for files that can be made again, such as compiled programs."""

import os
from collections.abc import Mapping


def cache_folder(name: str, environ: Mapping[str, str] = os.environ, local: bool = False) -> str:
    """The folder ``name`` in $PDROP_CACHE, by default ``$XDG_CACHE_HOME/pdrop`` or ``~/.cache/pdrop``; not created.

    $PDROP_CACHE may be in a bucket, such as ``gs://bucket/cache``. The default is taken then if it has to be ``local``.
    """
    root = os.path.expanduser(environ.get("PDROP_CACHE", ""))
    if not root or (local and "://" in root):
        # The XDG specification says to ignore relative paths.
        base = environ.get("XDG_CACHE_HOME", "")
        root = os.path.join(base if os.path.isabs(base) else os.path.expanduser("~/.cache"), "pdrop")
    return f"{root.rstrip('/')}/{name}"
