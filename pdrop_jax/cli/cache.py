"""``pdrop cache``: the models that were converted when they were first used."""

import dataclasses
import json
import time
from typing import Annotated, Literal

import tyro

from pdrop_jax.cli.options import Json
from pdrop_jax.errors import UserError, printable


def run(
    action: tyro.conf.Positional[Literal["list", "clear"]],
    model: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[MODEL …]")] = (),
    json_output: Json = False,
) -> None:
    """List or remove the converted models in ~/.cache/pdrop, or in $PDROP_CACHE. Downloaded files are in the cache of
    the Hugging Face Hub, see `hf cache --help`.

    Args:
      action: "list" shows source, revision, dtype, size and last use; "clear" removes the models.
      model: Only these models: ids on the Hub, folders, or ids of the list (default: all).
    """
    from pdrop_jax.convert import cache

    found = cache.entries()
    known = {name for entry, folder in found for name in (entry.source, folder.name)}
    if unknown := [name for name in model if name not in known]:
        raise UserError(f"{unknown[0]} is not in {cache.root()}; pdrop cache list shows what is")
    chosen = [(entry, folder) for entry, folder in found if not model or {entry.source, folder.name} & set(model)]
    rows = [
        dataclasses.asdict(entry)
        | {"id": folder.name, "bytes": cache.size(folder), "last_use": cache.last_use(folder), "folder": str(folder)}
        for entry, folder in chosen
    ]
    if action == "clear":
        for _, folder in chosen:
            cache.remove(folder)
    if json_output:
        print(json.dumps(rows))
        return
    total = sum(row["bytes"] for row in rows) / 1e6
    done = "removed" if action == "clear" else "kept"
    for row in rows if action == "list" else ():
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["last_use"]))
        revision = f"@{row['revision']}" if row["revision"] else ""
        print(printable(f"{row['id']}  {row['bytes'] / 1e6:,.1f} MB  {used}  {row['source']}{revision}"))
    print(printable(f"{len(rows)} models, {total:,.1f} MB, {done} in {cache.root()}"))
