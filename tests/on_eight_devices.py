"""Tests that need eight devices: ``test_mesh.py`` runs them in a process of their own, whose CPU counts as eight."""

import dataclasses
import functools
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from PIL import Image
from tiny import llava_config, params_of, training_batch
from tiny_run import CONFIG as RUN_CONFIG
from tiny_run import TOKENIZER, arrays_of, compiled_in, losses, recipe_in, write_data, write_start

from pdrop_jax import checkpoint, compilation_cache, sharding
from pdrop_jax.analysis.settings import StudyOptions
from pdrop_jax.analysis.study import run_study
from pdrop_jax.batch import Bucket
from pdrop_jax.config import LlavaConfig, TextConfig
from pdrop_jax.convert.importer import read
from pdrop_jax.convert.names import torch_arrays
from pdrop_jax.errors import UserError
from pdrop_jax.eval.questions import Question
from pdrop_jax.families.gemma3.config import GemmaVisionConfig, gemma3_text
from pdrop_jax.families.qwen2_vl.config import QwenVisionConfig
from pdrop_jax.families.qwen2_vl.inputs import lay_out
from pdrop_jax.generation.chat import Session
from pdrop_jax.generation.continuous import Engine
from pdrop_jax.generation.engine import decode, generate, start
from pdrop_jax.generation.next_token import token_sampler
from pdrop_jax.generation.pretrained import Model
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.inputs.anyres import whole
from pdrop_jax.inputs.assemble import Row, assemble
from pdrop_jax.inputs.buckets import choose_bucket
from pdrop_jax.inputs.chat_template import IMAGE_PLACEHOLDER
from pdrop_jax.inputs.processor import Processor
from pdrop_jax.model.attention import attention
from pdrop_jax.model.cache import StageCache, scatter_token, write_in_all_layers
from pdrop_jax.model.decoder import positions_of
from pdrop_jax.model.drop import Boundary, drop, pyramiddrop_score
from pdrop_jax.model.layers import linear
from pdrop_jax.model.params import init_params
from pdrop_jax.model.placement import shardings
from pdrop_jax.model.quantization import QuantizedKernel, quantize_decoder
from pdrop_jax.model.rope import rope_tables
from pdrop_jax.model.splash import splash_causal
from pdrop_jax.model.vision import image_features
from pdrop_jax.model.vlm import embed, embed_tokens, forward
from pdrop_jax.parity.replay import Reference, check
from pdrop_jax.schedule import DropSchedule
from pdrop_jax.train.loop import train
from pdrop_jax.train.optimizer import make_optimizer
from pdrop_jax.train.recipe import MeshRecipe, OptimizerRecipe
from pdrop_jax.train.step import init_state, train_step

GOLDEN = pathlib.Path(__file__).parent / "golden"
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
HARDEST = MESHES[2:]  # all along tensor, and all axes at once: what other families are tried on
CONFIG = llava_config()
BATCH = jax.tree.map(lambda x: np.concatenate([x] * 3)[:8], training_batch())
GREEDY = token_sampler(Sampling())


def mesh_of(shape):
    return sharding.make_mesh(dict(zip(sharding.AXES, shape, strict=True)))


def placed(mesh, params, batch):
    params = jax.device_put(params, shardings(CONFIG, params, mesh))
    return params, jax.tree.map(lambda x: jax.device_put(x, sharding.batch_sharding(mesh)), batch)


def close(ours, theirs, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-5), ours, theirs)


@pytest.fixture(scope="module")
def one_device():
    """Logits, tokens, and the state and metrics after a step."""
    params = params_of(CONFIG)
    output = jax.jit(forward, static_argnums=0)(CONFIG, params, BATCH)
    return jax.device_get((output.logits, output.buffer.index, answer(params, BATCH), *step(params, BATCH)))


def answer(params, batch):
    stop = np.array([-1], np.int32)
    state, *_ = start(CONFIG, params, batch, jax.random.key(0), GREEDY, stop, capacity=8)
    return decode(CONFIG, params, state, np.int32(8), GREEDY, stop).tokens


def step(params, batch, mesh=None):
    optimizer = make_optimizer(CONFIG, OptimizerRecipe(learning_rate=1e-3, warmup=0.0, eps=1e-2), 10)
    params = jax.tree.map(jnp.array, params)

    def init(params):
        return init_state(CONFIG, params, ("vision", "projector", "llm"), optimizer, jnp.float32)

    where = mesh and shardings(CONFIG, jax.eval_shape(init, params), mesh)
    state = jax.jit(init, out_shardings=where)(params)
    state, metrics = train_step(CONFIG, optimizer, state, batch, dtype=jnp.float32)
    return state.trained, (metrics.loss, metrics.grad_norm)


@pytest.mark.parametrize("shape", MESHES)
def test_a_mesh_changes_nothing(shape, one_device):
    logits, index, tokens, trained, metrics = one_device
    mesh = mesh_of(shape)
    params, batch = placed(mesh, params_of(CONFIG), BATCH)
    with jax.set_mesh(mesh):
        output = jax.jit(forward, static_argnums=0)(CONFIG, params, batch)
        valid = np.arange(index.shape[1]) < np.asarray(output.buffer.length)[:, None]
        np.testing.assert_array_equal(np.asarray(output.buffer.index)[valid], index[valid])
        close(np.asarray(output.logits)[valid], logits[valid])
        np.testing.assert_array_equal(answer(params, batch), tokens)
        ours, ours_metrics = step(params, batch, mesh)
    close(ours_metrics, metrics)
    close(ours, trained)


@pytest.mark.parametrize("shape", MESHES)
def test_no_device_sees_all_embeddings(shape):
    """Devices that share a table exchange their parts of the width, for the rows of all of them but not of copies."""
    mesh, ids = mesh_of(shape), np.random.default_rng(0).integers(0, 40, (8, 64)).astype(np.int32)
    table = np.random.default_rng(1).standard_normal((40, 32)).astype(np.float32)

    def total(table, ids):
        return jnp.square(embed_tokens(CONFIG, {"embed": {"embedding": table}}, ids)).sum()

    expected = jax.jit(jax.grad(total))(table, ids)
    cut = jax.sharding.NamedSharding(mesh, sharding.partition(("vocab", "model"), table.shape, mesh))
    args = jax.device_put(table, cut), jax.device_put(ids, sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(total), out_shardings=cut).lower(*args).compile()
    close(program(*args), expected)
    assert f"f32[8,64,{32 // shape[1]}]" in program.as_text() or shape[0] > 1
    if shape[0] > 1 or shape[1] > 1:
        assert "f32[8,64,32]" not in program.as_text()


@pytest.mark.parametrize("shape", MESHES)
def test_a_drop_stays_within_the_rows_of_a_device(shape):
    mesh = mesh_of(shape)
    params, batch = placed(mesh, params_of(CONFIG), BATCH)
    plan = CONFIG.schedule.plan(CONFIG.text.num_layers, BATCH.bucket)

    def boundary(params, batch):
        buffer = embed(CONFIG, params, batch, plan[0].slots)
        rope = rope_tables(CONFIG.text, positions_of(CONFIG.schedule, buffer))
        first = jax.tree.map(lambda x: x[0], params["stages"]["1"])
        at = Boundary(CONFIG, 0, buffer, rope, first)
        return drop(plan[1], at, pyramiddrop_score, max(BATCH.bucket.images))[0].hidden

    with jax.set_mesh(mesh):
        text = jax.jit(boundary).lower(params, batch).compile().as_text()
    # What is moved is parameters, indices, features of crops, which are sharded over tensor too, and, where heads are
    # cut, scores: never hidden states of all rows.
    moved = re.findall(r"= \w+\[([\d,]+)\][^=]*\b(?:all-gather|all-to-all|collective-permute)\(", text)
    hidden = len(BATCH.length) * plan[1].slots * CONFIG.text.hidden_size
    assert bool(moved) == (shape[1] > 1 or shape[2] > 1)
    assert max((math.prod(map(int, dims.split(","))) for dims in moved), default=0) < hidden


@pytest.mark.parametrize("class_attention", [False, True])
@pytest.mark.parametrize("rows", [5, 2])
def test_crops_that_do_not_divide_are_padded_for_the_tower(rows, class_attention):
    """Ten crops: two on each device, where the rows of the mesh alone would leave five. A row's crops stay with it."""
    shape = rows, 10 // rows, *CONFIG.vision.crop_shape
    pixels, tower = np.random.default_rng(0).normal(size=shape).astype(np.float32), CONFIG.vision
    run = jax.jit(image_features, static_argnums=0, static_argnames="class_attention")
    alone = run(CONFIG, params_of(CONFIG), pixels, class_attention=class_attention)
    mesh = mesh_of((1, 2, 4))
    params = jax.device_put(params_of(CONFIG), shardings(CONFIG, params_of(CONFIG), mesh))
    pixels = jax.device_put(pixels, sharding.batch_sharding(mesh, rows))
    with jax.set_mesh(mesh):
        assert [sharding.padding_for("rows", n) for n in (1, 3, 4, 6, 8, 10, 16)] == [0, 5, 4, 2, 0, 6, 0]
        program = run.lower(CONFIG, params, pixels, class_attention=class_attention).compile()
        found = program(params, pixels)
    close(found, alone)
    text = program.as_text()
    assert f"f32[2,{tower.patches_a_side**2 + tower.class_tokens},{tower.hidden_size}]" in text
    assert rows == 5 or "collective-permute(" not in text


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((8, 16, 4), (("fsdp", "tensor"),)),
        ((4, 32, 4), ("fsdp", "tensor")),
        ((2, 16, 4), ("fsdp", "tensor")),
        ((1, 16, 4), (None, "tensor")),
        ((2, 7, 4), ("fsdp",)),
        ((4, 7, 4), ("fsdp",)),
        ((6, 12, 4), ("fsdp", "tensor")),
        ((8, 1, 4), ("fsdp",)),
    ],
)
def test_hidden_states_are_cut_by_whole_rows_if_there_are_enough(shape, axes):
    with jax.set_mesh(mesh_of((1, 2, 4))):
        assert jax.jit(sharding.constrain_hidden)(jnp.zeros(shape)).sharding.spec == PartitionSpec(*axes)


def test_few_rows_whose_slots_are_no_whole_tiles_are_cut_as_one():
    """No spec says so: two rows of 12 slots on four devices, 6 slots each."""
    cut = jax.jit(lambda x: sharding.constrain_hidden(jnp.sin(sharding.constrain_hidden(x))))
    with jax.set_mesh(mesh_of((1, 2, 4))):
        text = cut.lower(jnp.zeros((4, 12, 4))).compile().as_text()
    assert re.findall(r"= f32\[([\d,]+)\]\S* sine\(", text) == ["1,6,4"]


def test_few_rows_give_what_they_give_on_one_device(one_device):
    logits, index, *_ = one_device
    mesh, few = mesh_of((1, 2, 4)), jax.tree.map(lambda x: x[:4], BATCH)
    params, batch = placed(mesh, params_of(CONFIG), few)
    with jax.set_mesh(mesh):
        output = jax.jit(forward, static_argnums=0)(CONFIG, params, batch)
    valid = np.arange(index.shape[1]) < np.asarray(output.buffer.length)[:, None]
    np.testing.assert_array_equal(np.asarray(output.buffer.index)[valid], index[:4][valid])
    close(np.asarray(output.logits)[valid], logits[:4][valid])


@pytest.mark.parametrize("shape", [(2, 2, 2), (2, 1, 4)])
def test_the_tpu_kernel_is_given_the_rows_and_heads_of_a_device(shape):
    """Two key-value heads: on four devices they are repeated, and their gradients added up."""
    inputs = [jax.random.normal(jax.random.key(n), (4, 128, heads, 128)) for n, heads in enumerate((4, 2, 2))]
    length = jnp.array([128, 50, 128, 7])
    valid = np.arange(128) < np.asarray(length)[:, None]

    def values_and_gradient(of):
        def loss(inputs):
            values = of(*inputs)
            return (jnp.sin(values) * valid[..., None, None]).sum(), values

        (_, values), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs)
        return np.asarray(values)[valid], gradient

    expected = values_and_gradient(functools.partial(attention, causal=True, length=length, implementation="xla"))
    with jax.set_mesh(mesh_of(shape)):
        ours = values_and_gradient(functools.partial(splash_causal, interpret=True))
    close(ours, expected)


@pytest.mark.parametrize("shape", [(2, 2, 2), (2, 1, 4)])
def test_a_tpu_writes_a_token_into_the_rows_and_heads_of_a_device(shape, monkeypatch):
    """Two key-value heads: four devices have copies of both."""
    cache, new = (
        StageCache(*(jax.random.normal(jax.random.key(n), dims) for n in pair))
        for dims, pair in (((3, 4, 2, 32, 8), (0, 1)), ((3, 4, 1, 2, 8), (2, 3)))
    )
    slot = jnp.array([0, 17, 31, 32])
    expected = scatter_token(cache, new, slot)
    monkeypatch.setattr("pdrop_jax.model.cache.platform", lambda: "tpu")
    with jax.set_mesh(mesh_of(shape)):
        program = jax.jit(write_in_all_layers).lower(cache, new, slot).compile()
        jax.tree.map(np.testing.assert_array_equal, program(cache, new, slot), expected)


@pytest.mark.parametrize("case", ["prefill_batch_ragged", "gqa_decode_greedy", "train_multi_turn"])
def test_recorded_vectors(case):
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    (row,) = check(GOLDEN, Reference(read, torch_arrays), [case], mesh)
    assert row.ok, row


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 3, "num_heads": 4}
DEEPSTACK = {
    "kind": "qwen3_vl",
    "activation": "gelu_tanh",
    "window_size": None,
    "position_side": 5,
    "deepstack_layers": (0, 2),
}


def check_on_a_mesh(config, rows, shape):
    """A random model gives the logits and keeps the tokens that it does on one device."""
    batch, params = assemble(rows, config, choose_bucket(rows, config)), init_params(config)
    run = jax.jit(forward, static_argnums=0)
    alone = run(config, params, batch)
    mesh = mesh_of(shape)
    with jax.set_mesh(mesh):
        found = run(
            config,
            jax.device_put(params, shardings(config, params, mesh)),
            jax.tree.map(lambda x: jax.device_put(x, sharding.batch_sharding(mesh)), batch),
        )
    close(found.logits, alone.logits)
    close(found.buffer.index, alone.buffer.index)


@pytest.mark.parametrize("own", [{"full_layers": (1,)}, DEEPSTACK], ids=["windows", "deepstack"])
@pytest.mark.parametrize("shape", HARDEST)
def test_pictures_of_any_size_on_a_mesh(shape, own):
    """A tower over pictures of any size, M-RoPE through two drops, the first before all of DeepStack is added."""
    tower, deepstack = QwenVisionConfig(**SMALL, **own), own is DEEPSTACK
    text = TextConfig(300, 64, 96, 4, 8, 8, 8, qkv_bias=not deepstack, max_length=256, mrope_sections=(1, 1, 2))
    text = dataclasses.replace(text, qk_norm=deepstack, mrope_interleaved=deepstack)
    config = LlavaConfig(tower, text, DropSchedule((1, 3), (0.5, 0.25)), select_layer=-1)
    rng, rows = np.random.default_rng(0), []
    for n in range(8):
        grids = [(1, 2 * (n + 1), 4), (1, 4, 6)][: n % 3]
        images = [lay_out(rng.normal(size=(math.prod(g), tower.patch_values)), g, tower) for g in grids]
        rows.append(Row([*[IMAGE_PLACEHOLDER] * len(images), *range(5 + n)], images))
    check_on_a_mesh(config, rows, shape)


@pytest.mark.parametrize("shape", HARDEST)
def test_windows_by_the_slots_before_the_drops_on_a_mesh(shape):
    """Gemma 3: both kinds of layers, pictures that see themselves both ways, norms of heads."""
    tower = GemmaVisionConfig(56, 14, 32, 48, 2, 4, tokens_a_side=2)
    text = dataclasses.replace(
        gemma3_text("4b"),
        vocab_size=304,
        hidden_size=64,
        intermediate_size=96,
        num_layers=6,
        num_kv_heads=8,
        head_dim=8,
        max_length=256,
        sliding_window=6,
        full_layers=(2, 5),
    )
    config = LlavaConfig(tower, text, DropSchedule((2, 4), (0.5, 0.25)), projector_layers=1, select_layer=-1)
    rng, rows = np.random.default_rng(0), []
    for n in range(8):
        images = [whole(rng.normal(size=(56, 56, 3)).astype(np.float32), config) for _ in range(n % 3)]
        rows.append(Row([*[IMAGE_PLACEHOLDER] * len(images), *range(5 + n)], images))
    check_on_a_mesh(config, rows, shape)


def test_parameters_are_cut():
    mesh = mesh_of((2, 2, 2))
    params = jax.device_put(params_of(CONFIG), shardings(CONFIG, params_of(CONFIG), mesh))
    kernel = params["stages"]["0"]["attention"]["q"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert kernel.addressable_shards[0].data.size == kernel.size // 4


@pytest.mark.parametrize("quantize", ["int8", "w8a8"])
def test_quantized_on_a_mesh(tmp_path, quantize):
    """Loaded in 8 bits each part where the table wants it, and the answers are those of one device."""
    checkpoint.save(tmp_path / "model", CONFIG, params_of(CONFIG))
    mesh = mesh_of((2, 2, 2))
    _, params = checkpoint.load(tmp_path / "model", mesh=mesh, quantize=quantize)
    expected = quantize_decoder(CONFIG, params_of(CONFIG), quantize)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    for x, where in zip(jax.tree.leaves(params), jax.tree.leaves(shardings(CONFIG, params, mesh)), strict=True):
        assert x.sharding.is_equivalent_to(where, x.ndim)
    assert params["stages"]["0"]["mlp"]["up"]["kernel"].qvalue.addressable_shards[0].data.shape == (1, 16, 24)
    batch = jax.tree.map(lambda x: jax.device_put(x, sharding.batch_sharding(mesh)), BATCH)
    with jax.set_mesh(mesh):
        tokens = answer(params, batch)
    np.testing.assert_array_equal(tokens, answer(expected, BATCH))


def test_products_of_integers_are_scaled_before_devices_exchange_them():
    rng, mesh = np.random.default_rng(0), mesh_of((2, 2, 2))
    kernel = QuantizedKernel(
        jnp.asarray(rng.integers(-127, 128, (4, 16, 32)), jnp.int8), jnp.asarray(rng.random((1, 1, 32)), jnp.float32), 8
    )
    x = rng.standard_normal((8, 3, 4, 16)).astype(np.float32)
    product = jax.jit(functools.partial(linear, inputs=2, summed="heads"))
    expected = product({"kernel": kernel}, x)
    cut = jax.sharding.NamedSharding(mesh, PartitionSpec("tensor"))
    qvalue = jax.device_put(kernel.qvalue, cut)
    with jax.set_mesh(mesh):
        args = {"kernel": dataclasses.replace(kernel, qvalue=qvalue)}, jax.device_put(x, sharding.batch_sharding(mesh))
        text = product.lower(*args).compile().as_text()
        close(product(*args), expected)
    assert set(re.findall(r"= (\w+)\[[\d,]*\]\S* all-reduce", text)) == {"f32"}


CHAT = dataclasses.replace(
    RUN_CONFIG,
    text=dataclasses.replace(RUN_CONFIG.text, num_layers=2),
    schedule=DropSchedule((1,), (0.3,)),
    template="bare",
)


@pytest.mark.parametrize("mode", ["keep", "rerank"])
def test_a_conversation_on_a_mesh_is_that_on_one_device(mode):
    """A question about a picture and one about its answer: the same tokens, image tokens kept, and tokens cached."""
    params, processor = params_of(CHAT), Processor.load(TOKENIZER, CHAT)
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})

    def answers(params, mesh):
        session = Session(Model(CHAT, params, processor, mesh), mode)
        asked = [("What?", Image.new("RGB", (30, 20), "red")), ("And?", None)]
        found = [session.ask(question, image, Sampling(3)) for question, image in asked]
        return [(answer.token_ids, answer.kept, answer.cached, answer.stage_lengths) for answer in found]

    expected = answers(params, None)
    assert [len(ids) for ids, *_ in expected] == [3, 3]
    assert answers(jax.device_put(params, shardings(CHAT, params, mesh)), mesh) == expected


COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: COMPILED.append(event) if event == compilation_cache.COMPILED else None
)


def test_a_study_on_a_mesh_is_that_on_one_device():
    params, processor = params_of(CHAT), Processor.load(TOKENIZER, CHAT)
    pictures = [Image.new("RGB", (30, 20), color) for color in ("red", "blue")]
    questions = [
        Question(n, f"<image>\n{text}", (pictures[n % 2],)) for n, text in enumerate(("What?", "Where?", "Why?"))
    ]
    options = StudyOptions(layers=[1], ratios=[0.0], scores=["pyramiddrop"], edit_sizes=[])

    def effects(mesh):
        study = run_study(Model(CHAT, params, processor, mesh), questions, options, batch_size=4, max_new_tokens=2)
        return {row.setting.name: (row.effect.flipped.tolist(), row.effect.kl) for row in study.rows}

    ours, expected = effects(sharding.make_mesh({"fsdp": 4, "tensor": 2})), effects(None)
    assert ours.keys() == expected.keys() > {"layer 1, ratio 0", "pyramiddrop", "bfloat16"}
    for name in ours:
        assert ours[name][0] == expected[name][0]
        np.testing.assert_allclose(ours[name][1], expected[name][1], atol=1e-2 if name == "bfloat16" else 1e-5)
    assert expected["layer 1, ratio 0"][1].min() > 1e-3


def test_requests_on_a_mesh_are_answered_as_on_one_device():
    """Slots are sharded over the batch axes, heads over tensor; nothing compiles after ``warm_up``."""
    params, processor = params_of(CHAT), Processor.load(TOKENIZER, CHAT)
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    asked = [("What?", Image.new("RGB", (30, 20), "red")), ("And?", None)] * 3
    expected = generate(Model(CHAT, params, processor), *zip(*asked[:2], strict=True), Sampling(6)).token_ids * 3

    with jax.set_mesh(mesh):
        cut = jax.device_put(params, shardings(CHAT, params, mesh))
    buckets = [Bucket(32), Bucket(32, (16,))]
    options = {"prefill_rows": 2, "image_cache": 2**20, "prefix_cache": 2**20}
    with Engine(Model(CHAT, cut, processor, mesh), 4, max_new_tokens=6, buckets=buckets, **options) as engine:
        engine.warm_up()
        cache = engine._batch._state.model.caches[0].k
        assert cache.sharding.shard_shape((1, 4, 2, 9, 8)) == (1, 1, 1, 9, 8)
        before = len(COMPILED)
        handles = [engine.submit(*row, Sampling(6 - n)) for n, row in enumerate(asked)]
        assert [handle.result().token_ids for handle in handles] == [ids[: 6 - n] for n, ids in enumerate(expected)]
        assert COMPILED[before:] == []
        assert [counts.hits for counts in engine.caches.values()] == [0, 2]


def test_a_run_goes_on_on_another_mesh(tmp_path):
    """Six steps on copies against two on (2, 2, 2) and four on (1, 8, 1); the model is read on a third mesh.

    On each of them a shape compiles once: a step leaves its state where it found it.
    """
    write_data(tmp_path / "data", text_every=100)  # nearly all with pictures: one shape
    write_start(tmp_path / "start")
    recipe = recipe_in(tmp_path, run_batch_size=8, optimizer_eps=1e-2, data_text_buckets=(64,))

    programs = []

    def run(name, shape):
        changed = dataclasses.replace(recipe.run, folder=str(tmp_path / name))
        mesh = MeshRecipe(**dict(zip(sharding.AXES, shape, strict=True)))
        before = train_step._cache_size()
        train(dataclasses.replace(recipe, run=changed, mesh=mesh))
        programs.append(train_step._cache_size() - before)

    run("copies", (8, 1, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pdrop_jax.train.stopping.StopRequest.requested", lambda _, step: step == 2)
        run("moved", (2, 2, 2))
    run("moved", (1, 8, 1))
    assert programs[0] == compiled_in(tmp_path / "copies")
    assert programs[1] + programs[2] == compiled_in(tmp_path / "moved")
    copies, moved = losses(tmp_path / "copies"), losses(tmp_path / "moved")
    assert [step for step, _ in copies] == [step for step, _ in moved]
    np.testing.assert_allclose([loss for _, loss in copies], [loss for _, loss in moved], rtol=1e-5)
    close(arrays_of(tmp_path / "copies"), arrays_of(tmp_path / "moved"), atol=1e-4)
    config, params = checkpoint.load(tmp_path / "moved/model", mesh=mesh_of((1, 4, 2)))
    assert config == RUN_CONFIG
    assert not params["stages"]["0"]["mlp"]["up"]["kernel"].is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, params, arrays_of(tmp_path / "moved"))


def test_a_mesh_that_does_not_fit_is_refused(tmp_path):
    write_data(tmp_path / "data")
    write_start(tmp_path / "start")
    refused = {"needs 3 devices": MeshRecipe(fsdp=3), "each process has 8 devices": MeshRecipe(tensor=3)}
    for message, mesh in refused.items():
        with pytest.raises(UserError, match=message):
            train(dataclasses.replace(recipe_in(tmp_path), mesh=mesh))
