"""The same records in each format of training data, written by the libraries that people use."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from PIL import Image

PICTURES = 5
NAMES = (
    "json",
    "jsonl",
    "parquet",
    "parquet_lists",
    "tar",
    "messages",
    "messages_jsonl",
    "messages_parquet",
    "messages_tar",
)


def picture(number):
    """The file of a small picture of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (30, 20), (40 * number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def records(count=12):
    """LLaVA records of no, one or two pictures."""
    found = []
    for number in range(count):
        names = [f"{(number + n) % PICTURES}.png" for n in range(number % 3)]
        asked = "<image>\n" * len(names) + "What?"
        turns = [asked, f"n{number}" + " word" * (number % 4), "And?", "So"][: 2 + 2 * (number % 2)]
        said = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(turns)]
        found.append({"id": f"r{number}", "image": names, "conversations": said})
    return found


def as_messages(record, named):
    """A LLaVA record as messages, whose pictures are named in their contents or in a list beside them."""
    names = iter(record["image"])
    messages = []
    for turn in record["conversations"]:
        images = turn["value"].count("<image>\n")
        text = {"type": "text", "text": turn["value"].replace("<image>\n", "")}
        content = [{"type": "image"} | ({"image": next(names)} if named else {}) for _ in range(images)]
        messages.append({"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": [*content, text]})
    return {"id": record["id"], "messages": messages} | ({} if named else {"images": record["image"]})


def write_images(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(PICTURES):
        (folder / f"{number}.png").write_bytes(picture(number))
    return str(folder)


def write(folder, name, given=None):
    """A data set below ``folder``: its path, and the folder of its images or None if they are inside."""
    given = records() if given is None else given
    place, images = folder / name, None
    place.mkdir(parents=True)
    if name in ("json", "jsonl", "messages", "messages_jsonl"):
        said = [as_messages(record, named=True) for record in given] if "messages" in name else given
        lines = name.endswith("jsonl")
        place = place / ("data.jsonl" if lines else "data.json")
        place.write_text("\n".join(map(json.dumps, said)) if lines else json.dumps(said))
        images = write_images(folder / "images")
    elif "parquet" in name:
        write_parquet(place, name, given)
    else:
        write_tar(place, given, "messages" in name)
    return str(place), images


def embedded(name):
    return {"bytes": picture(int(name.partition(".")[0])), "path": name}


def write_parquet(place, name, given):
    """Two shards of row groups of three, named as datasets names them."""
    rows = [as_messages(record, named=False) if "messages" in name else dict(record) for record in given]
    for row, record in zip(rows, given, strict=True):
        pictures = [embedded(image) for image in record["image"]]
        row.pop("image", None)
        if name == "parquet":
            assert len(pictures) < 2
            row["image"] = pictures[0] if pictures else None
        else:
            row["images"] = pictures
    half = len(rows) // 2
    for shard, part in enumerate((rows[:half], rows[half:])):
        pq.write_table(pa.Table.from_pylist(part), place / f"train-{shard:05d}-of-00002.parquet", row_group_size=3)


def write_tar(place, given, messages):
    """Two shards. The records name pictures too, which are not looked for in a folder."""
    half = len(given) // 2
    for shard, part in enumerate((given[:half], given[half:])):
        with webdataset.TarWriter(str(place / f"{shard:05d}.tar")) as writer:
            for number, record in enumerate(part):
                files = {f"{n}.png": picture(int(image[0])) for n, image in enumerate(record["image"])}
                said = as_messages(record, named=True) if messages else record
                writer.write({"__key__": f"{shard}/{number:06d}", "json": said, **files})


def tar_of(path, members):
    """A tar of (TarInfo or name, bytes)."""
    with tarfile.open(path, "w") as tar:
        for member, content in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)
