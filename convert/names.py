"""Which PyTorch tensor is which of our arrays: one table of names for each format, used in both directions.

The arrays of decoder and vision layers are stacked here and separate tensors in PyTorch, so a PyTorch name contains
``{n}``, the layer. PyTorch's linear layers store (out, in), ours (in, out) with heads as a separate axis.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable

import numpy as np
from flax.traverse_util import flatten_dict

from pdrop_jax.config import LlavaConfig
from pdrop_jax.errors import UserError
from pdrop_jax.model.compression import Expansion, averaging, expansion
from pdrop_jax.model.params import Params, abstract_params

Shape = tuple[int, ...]
ONLY_HERE = "no other library can load a model that compresses, merges or slices pictures as LLaVA-UHD v4 does"


@dataclasses.dataclass(frozen=True)
class Transform:
    """How one of our arrays and one PyTorch tensor store the same values.

    Attributes:
      shape: our shape -> PyTorch's shape.
      to_ours: PyTorch's array, our shape -> our array.
      to_torch: inverse of ``to_ours``, from our array alone.
    """

    shape: Callable[[Shape], Shape]
    to_ours: Callable[[np.ndarray, Shape], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


def _linear(inputs: int) -> Transform:
    """(*in, *out) with ``inputs`` input axes <-> (out, in)."""

    def matrix(shape: Shape) -> Shape:
        return math.prod(shape[inputs:]), math.prod(shape[:inputs])

    return Transform(matrix, lambda x, shape: x.T.reshape(shape), lambda x: x.reshape(matrix(x.shape)[::-1]).T)


FLAT = Transform(lambda shape: (math.prod(shape),), lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1))
SAME = Transform(lambda shape: shape, lambda x, shape: x, lambda x: x)
LINEAR = _linear(1)  # (D, F) or (D, N, H)
MERGE = _linear(2)  # (N, H, D)
CONV = Transform(  # (P, P, 3, D) <-> (D, 3, P, P)
    lambda shape: (shape[3], shape[2], shape[0], shape[1]),
    lambda x, shape: x.transpose(2, 3, 1, 0),
    lambda x: x.transpose(3, 2, 0, 1),
)

Table = dict[str, tuple[str, Transform]]  # our path -> PyTorch name, transform


def norm(ours: str, theirs: str) -> Table:
    return {f"{ours}.scale": (f"{theirs}.weight", SAME), f"{ours}.bias": (f"{theirs}.bias", SAME)}


def dense(ours: str, theirs: str, transform: Transform = LINEAR) -> Table:
    return {f"{ours}.kernel": (f"{theirs}.weight", transform), f"{ours}.bias": (f"{theirs}.bias", FLAT)}


VISION: Table = {
    **dense("embed.patch", "embeddings.patch_embedding", CONV),
    "embed.class_token": ("embeddings.class_embedding", SAME),
    "embed.position": ("embeddings.position_embedding.weight", SAME),
    **norm("embed.norm", "pre_layrnorm"),
    **norm("layers.attention_norm", "encoder.layers.{n}.layer_norm1"),
    **dense("layers.attention.q", "encoder.layers.{n}.self_attn.q_proj"),
    **dense("layers.attention.k", "encoder.layers.{n}.self_attn.k_proj"),
    **dense("layers.attention.v", "encoder.layers.{n}.self_attn.v_proj"),
    **dense("layers.attention.o", "encoder.layers.{n}.self_attn.out_proj", MERGE),
    **norm("layers.mlp_norm", "encoder.layers.{n}.layer_norm2"),
    **dense("layers.mlp.up", "encoder.layers.{n}.mlp.fc1"),
    **dense("layers.mlp.down", "encoder.layers.{n}.mlp.fc2"),
}
DECODER: Table = {
    "embed.embedding": ("embed_tokens.weight", SAME),
    **norm("stages.attention_norm", "layers.{n}.input_layernorm"),
    **dense("stages.attention.q", "layers.{n}.self_attn.q_proj"),
    **dense("stages.attention.k", "layers.{n}.self_attn.k_proj"),
    **norm("stages.attention.q_norm", "layers.{n}.self_attn.q_norm"),
    **norm("stages.attention.k_norm", "layers.{n}.self_attn.k_norm"),
    **dense("stages.attention.v", "layers.{n}.self_attn.v_proj"),
    **dense("stages.attention.o", "layers.{n}.self_attn.o_proj", MERGE),
    **norm("stages.mlp_norm", "layers.{n}.post_attention_layernorm"),
    **dense("stages.mlp.gate", "layers.{n}.mlp.gate_proj"),
    **dense("stages.mlp.up", "layers.{n}.mlp.up_proj"),
    **dense("stages.mlp.down", "layers.{n}.mlp.down_proj"),
    **norm("norm", "norm"),
}


@dataclasses.dataclass(frozen=True)
class Naming:
    """The prefixes in which the formats differ. ``projector`` contains ``{i}``, the name of the layer."""

    vision: str
    decoder: str = ""
    head: str = ""
    projector: str = ""
    projector_index: Callable[[int], int] = lambda n: n + 1
    newline: str = ""

    def table(self, config: LlavaConfig) -> Table:
        rows = {f"vision.{ours}": (self.vision + theirs, transform) for ours, (theirs, transform) in VISION.items()}
        if not self.decoder:
            return rows
        rows |= {ours: (self.decoder + theirs, transform) for ours, (theirs, transform) in DECODER.items()}
        for n in range(config.projector_layers):
            rows |= dense(f"projector.linear_{n}", self.projector.format(i=self.projector_index(n)))
        return rows | {"head.kernel": (self.head, LINEAR), "newline.embedding": (self.newline, SAME)}


_ORIGINAL = Naming(
    vision="model.vision_tower.vision_tower.vision_model.",
    decoder="model.",
    head="lm_head.weight",
    projector="model.mm_projector.{i}",
    projector_index=lambda n: 2 * n,  # the odd ones are activations
    newline="model.image_newline",
)
_HF = Naming(
    vision="vision_tower.vision_model.",
    decoder="language_model.model.",
    head="language_model.lm_head.weight",
    projector="multi_modal_projector.linear_{i}",
    newline="image_newline",
)
_HF_MODULES = Naming(
    vision="model.vision_tower.vision_model.",
    decoder="model.language_model.",
    head="lm_head.weight",
    projector="model.multi_modal_projector.linear_{i}",
    newline="model.image_newline",
)
NAMINGS = {
    "original": _ORIGINAL,
    "original-linear": dataclasses.replace(_ORIGINAL, projector="model.mm_projector"),
    "hf": _HF,  # as transformers 4 saves, and as the checkpoints on the hub are
    "hf-5": dataclasses.replace(_HF, vision="vision_tower."),  # as transformers 5 saves
    "hf-modules": _HF_MODULES,  # names of the modules since transformers 4.52
    "hf-5-modules": dataclasses.replace(_HF_MODULES, vision="model.vision_tower."),
}
TOWERS = {"tower": Naming("vision_model."), "tower-5": Naming("")}  # a vision tower in a separate folder

# Present in some checkpoints but unused: rotary tables, position ids, the text model of a full CLIP.
IGNORED = re.compile(
    r"(.*\.rotary_emb\.inv_freq|(.*\.)?embeddings\.position_ids|text_model\..*"
    r"|logit_scale|logit_bias|text_projection\.weight|visual_projection\.weight)"
)


def expanded(transform: Transform, made: Expansion) -> Transform:
    """``transform`` for an array that is made of the one that it reads; no tensor is made of it in turn."""

    def to_torch(x: np.ndarray) -> np.ndarray:
        raise UserError(ONLY_HERE)

    return Transform(
        lambda shape: transform.shape(made.inverse(shape)),
        lambda x, shape: made.values(transform.to_ours(x, made.inverse(shape))),
        to_torch,
    )


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One of our arrays and the PyTorch tensors that it is made of.

    Attributes:
      path: ``stages.0.mlp.up.kernel``.
      shape: our shape, with the layers in front if it is a stack.
      names: one PyTorch name, or one for each layer of a stack.
      stacked: whether it is a stack.
    """

    path: str
    shape: Shape
    names: tuple[str, ...]
    stacked: bool
    transform: Transform

    @property
    def part_shape(self) -> Shape:
        """The part of our shape that one PyTorch tensor fills."""
        return self.shape[1:] if self.stacked else self.shape

    def torch_shapes(self) -> dict[str, Shape]:
        return dict.fromkeys(self.names, self.transform.shape(self.part_shape))


def leaves(config: LlavaConfig, naming: Naming) -> list[Leaf]:
    """Every array of a ``config`` model that ``naming`` has a row for.

    With early compression several of them may be made of the same tensor; without it each has its own.
    """
    table = naming.table(config)
    ranges = config.schedule.layer_ranges(config.text.num_layers)
    compression = config.vision.early_compression
    first = compression.after + 1 if compression else config.vision_layers
    result = []
    for path, leaf in flatten_dict(abstract_params(config), sep=".").items():
        row, layers, made = path, None, None
        if path.startswith("vision.layers."):
            layers = range(first)
        elif path.startswith("vision.later_layers."):
            row, layers = path.replace("later_layers", "layers"), range(first, config.vision_layers)
        elif path.startswith("vision.compressor."):
            row, made = path.replace("compressor", "layers"), expansion(path.removeprefix("vision.compressor."))
        elif path == "projector.linear_0.kernel" and config.family == "LLaVA" and config.crop_tower.merge_size > 1:
            made = averaging(config.crop_tower.merge_size**2)
        elif path.startswith("stages."):
            _, stage, array = path.split(".", 2)
            row, layers = f"stages.{array}", range(*ranges[int(stage)])
        if row in table:
            name, transform = table[row]
            names = (name.format(n=first - 1),) if layers is None else tuple(name.format(n=n) for n in layers)
            transform = expanded(transform, made) if made else transform
            result.append(Leaf(path, leaf.shape, names, layers is not None, transform))
    return result


def torch_arrays(config: LlavaConfig, params: Params, naming: Naming = NAMINGS["original"]) -> dict[str, np.ndarray]:
    """A parameter tree of ``config``, or a gradient with its structure, under PyTorch's names."""
    arrays = flatten_dict(params, sep=".")
    result: dict[str, np.ndarray] = {}
    for leaf in leaves(config, naming):
        parts = np.asarray(arrays[leaf.path]) if leaf.stacked else [np.asarray(arrays[leaf.path])]
        result |= {name: leaf.transform.to_torch(part) for name, part in zip(leaf.names, parts, strict=True)}
    return result


def torch_shapes(config: LlavaConfig, naming: Naming) -> dict[str, Shape]:
    """Name -> shape of every PyTorch tensor that ``leaves`` reads."""
    return {name: shape for leaf in leaves(config, naming) for name, shape in leaf.torch_shapes().items()}


def projector_shapes(config: LlavaConfig, naming: Naming) -> dict[str, Shape]:
    """Those of ``torch_shapes`` that are the projector's."""
    arrays = (leaf for leaf in leaves(config, naming) if leaf.path.startswith("projector."))
    return {name: shape for leaf in arrays for name, shape in leaf.torch_shapes().items()}


def unrun_shapes(config: LlavaConfig, naming: Naming) -> dict[str, Shape]:
    """Name -> shape of the unused tensors of the tower: layers after the selected one, the last norm, the head."""
    if config.family != "LLaVA":
        return {}  # everything runs
    whole = dataclasses.replace(config, select_layer=-1)
    tower = Naming(naming.vision)
    run = torch_shapes(config, tower)
    D, F = config.vision.hidden_size, config.vision.intermediate_size
    end: dict[str, Shape] = {"post_layernorm.weight": (D,), "post_layernorm.bias": (D,)}
    if config.crop_tower.pooling_head:
        end |= {
            "head.probe": (1, 1, D),
            "head.attention.in_proj_weight": (3 * D, D),
            "head.attention.in_proj_bias": (3 * D,),
            "head.attention.out_proj.weight": (D, D),
            "head.attention.out_proj.bias": (D,),
            "head.layernorm.weight": (D,),
            "head.layernorm.bias": (D,),
            "head.mlp.fc1.weight": (F, D),
            "head.mlp.fc1.bias": (F,),
            "head.mlp.fc2.weight": (D, F),
            "head.mlp.fc2.bias": (D,),
        }
    layers = {name: shape for name, shape in torch_shapes(whole, tower).items() if name not in run}
    return layers | {naming.vision + name: shape for name, shape in end.items()}


def closest(config: LlavaConfig, names: Iterable[str], namings: dict[str, Naming]) -> str:
    """The one of ``namings`` that most of ``names`` belong to."""
    found = set(names)
    return max(namings, key=lambda key: len(found & torch_shapes(config, namings[key]).keys()))
