"""The public names, and what an interactive user sees of them."""

import pdrop_jax
from pdrop_jax import Sampling


def test_dir_lists_the_public_names():
    assert set(dir(pdrop_jax)) == {*pdrop_jax.__all__, "__version__"}
    assert all(getattr(pdrop_jax, name) is not None for name in dir(pdrop_jax))


def test_reprs_are_short():
    model = pdrop_jax.load()
    assert repr(model) == "Model(LLaVA, 2.4M parameters, bfloat16, drops after layers 4, 5, 6)"
    session = pdrop_jax.Session(model, "keep")
    assert repr(session) == f"Session({model!r}, mode='keep', turns=0, images=0)"
    answer = pdrop_jax.generate(model, ["Hi"], sampling=Sampling(1))
    assert repr(answer).startswith("Generation(texts=['")
    assert len(repr(answer)) < 300
