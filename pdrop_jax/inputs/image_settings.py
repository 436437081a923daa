"""preprocessor_config.json: image preprocessing settings, validated before they are passed to transformers."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from pdrop_jax.errors import UserError, one_line
from pdrop_jax.io import read_json
from pdrop_jax.schema import Pixels, validated

Side = Annotated[int, Field(ge=1, le=4096)]  # pixels; the whole image is resized to it before cropping
Mean = Annotated[float, Field(ge=-255, le=255)]  # of a colour channel, after rescaling
Deviation = Annotated[float, Field(ge=1e-4, le=1e4)]


class Size(BaseModel):
    """A size in pixels: both edges, or the shortest one."""

    model_config = ConfigDict(extra="forbid")

    height: Side | None = None
    width: Side | None = None
    shortest_edge: Side | None = None


class Settings(BaseModel):
    """The keys that affect pixels. Others are ignored; null means transformers' default."""

    model_config = ConfigDict(extra="ignore")

    do_resize: bool | None = None
    size: Side | Size | None = None
    resample: Annotated[int, Field(ge=0, le=5)] | None = None  # PIL.Image.Resampling
    do_center_crop: bool | None = None
    crop_size: Side | Size | None = None
    do_rescale: bool | None = None
    rescale_factor: Annotated[float, Field(gt=0, le=255)] | None = None
    do_normalize: bool | None = None
    image_mean: tuple[Mean, Mean, Mean] | None = None
    image_std: tuple[Deviation, Deviation, Deviation] | None = None
    do_convert_rgb: bool | None = None
    do_pad: bool | None = None
    image_grid_pinpoints: Annotated[list[tuple[Pixels, Pixels]], Field(max_length=1024)] | None = None


def read_settings(folder: pathlib.Path, schema: type[BaseModel] = Settings) -> dict[str, Any]:
    """The image processor's settings in ``folder``, without null values; empty if the folder has none.

    Args:
      schema: the keys that are read.

    Raises:
      UserError: a file is malformed, or a value has the wrong type or is out of range.
    """
    path, found = folder / "preprocessor_config.json", None
    if path.exists():
        found = read_json(path)
    else:
        # transformers 5 saves a LLaVA processor as one file that contains the image processor.
        path = folder / "processor_config.json"
        found = read_json(path).get("image_processor") if path.exists() else None
    return {} if found is None else validated(schema, found, str(path)).model_dump(mode="json", exclude_none=True)


@contextlib.contextmanager
def making_processor(folder: pathlib.Path) -> Iterator[None]:
    """Turns what transformers says of the settings in ``folder`` into a UserError."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UserError(f"the image processor in {folder} cannot be read: {one_line(error)}") from None
