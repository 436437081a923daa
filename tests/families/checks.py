"""What every family is held to, given its tiny model of transformers and ours."""

import jax
import numpy as np
import torch

from pdrop_jax.convert.names import torch_arrays
from pdrop_jax.generation.chat import Session
from pdrop_jax.generation.continuous import Engine
from pdrop_jax.generation.engine import generate, generate_batch
from pdrop_jax.generation.sampling import Sampling
from pdrop_jax.inputs.assemble import assemble
from pdrop_jax.inputs.buckets import choose_bucket
from pdrop_jax.model.loss import compute_loss, count_targets
from pdrop_jax.model.vlm import forward

SAMPLING = Sampling(max_new_tokens=5)


def at_once(model, session, question, pictures):
    """The answer to the whole conversation in one prefill."""
    row = model.processor.row([*session.turns, (question, None)], pictures)
    batch = assemble([row], model.config, choose_bucket([row], model.config, 5))
    return generate_batch(model, batch, SAMPLING)


def check_conversation(model, mode, turns):
    """Each of ``turns``, (question, picture or None), is answered as if everything was asked at once."""
    session, pictures = Session(model, mode), []
    for question, picture in turns:
        pictures += [picture] if picture else []
        expected = at_once(model, session, f"<image>{question}" if picture else question, pictures)
        answer = session.ask(question, picture, SAMPLING)
        assert answer.token_ids == expected.token_ids[0]
        assert answer.kept == expected.kept[0]
        assert answer.stage_lengths == expected.stage_lengths[0]
    assert answer.cached > 0 or model.config.schedule.layers == (0,)


def check_drops(model, rows, run, new_tokens):
    """Logits, kept tokens and answers are those of a torch model whose tokens are deleted.

    Args:
      rows: (question, images).
      run: (row, new ids) -> (logits, kept tokens) of that model.
    """
    questions, images = zip(*rows, strict=True)
    batch = model.processor(list(questions), list(images))
    logits = jax.jit(forward, static_argnums=0)(model.config, model.params, batch).logits
    answers = generate_batch(model, batch, Sampling(max_new_tokens=new_tokens))
    for b, row in enumerate(rows):
        with torch.no_grad():
            theirs, kept = run(row, [])
            assert np.abs(np.asarray(logits)[b, : len(theirs)] - theirs.numpy()).max() < 1e-4
            assert answers.kept[b] == kept
            new = []
            for _ in answers.token_ids[b]:
                new.append(int(theirs[-1].argmax()))
                theirs, again = run(row, new)
                assert again == kept
        assert answers.token_ids[b] == new


def check_rows_alone(model, rows):
    """A row keeps and answers the same alone and in a batch of ``rows``, (question, images)."""
    questions, images = zip(*rows, strict=True)
    batch = generate(model, questions, images, SAMPLING)
    for b in range(len(rows)):
        alone = generate(model, questions[b : b + 1], images[b : b + 1], SAMPLING)
        assert alone.token_ids[0] == batch.token_ids[b]
        assert alone.kept[0] == [[image for image in at if image] for at in batch.kept[b]]
    return batch


def check_slots(model, rows, batch):
    """Requests that join a running batch are answered as the rows of ``batch``, a ``Generation``.

    Asked again, each recalls its pictures and what is in front of its question.
    """
    buckets = [choose_bucket([model.processor.row(*row) for row in rows], model.config)]
    new_tokens, shown = SAMPLING.max_new_tokens, sum(bool(images) for _, images in rows)
    caches = {"image_cache": 2**22, "prefix_cache": 2**22}
    with Engine(model, 2, max_new_tokens=new_tokens, buckets=buckets, prefill_rows=1, **caches) as engine:
        for lengths in ([1, *[new_tokens] * (len(rows) - 1)], [new_tokens] * len(rows)):
            # At first a slot is free again while the other one runs.
            handles = [engine.submit(*row, Sampling(n)) for row, n in zip(rows, lengths, strict=True)]
            found = [handle.result() for handle in handles]
            for b in range(len(rows)):
                assert found[b].token_ids == batch.token_ids[b][: lengths[b]]
                assert found[b].kept == batch.kept[b]
                assert found[b].stage_lengths == batch.stage_lengths[b]
        counts = engine.caches["prefixes"]
        assert (counts.hits, counts.misses) == (shown, shown)
        assert [answer.cached > 0 for answer in found] == [bool(images) for _, images in rows]


def check_gradients(config, params, rows, answers, predictions, model, naming):
    """The loss and every gradient are those of torch, with and without remat.

    Args:
      rows: of the prompts.
      answers: ids of each row's answer.
      predictions: logits (n, V) of torch's ``model`` for each answer's tokens.

    Returns:
      torch's gradients by name.
    """
    targets = sum(map(len, answers))
    pairs = zip(predictions, answers, strict=True)
    total = sum(torch.nn.functional.cross_entropy(x, torch.tensor(new), reduction="sum") for x, new in pairs)
    (total / targets).backward()
    batch = assemble(rows, config, choose_bucket(rows, config))
    assert int(count_targets(batch.labels)) == targets

    def loss(params, remat):
        return compute_loss(config, params, batch, remat=remat)[0] / targets

    theirs = {name: x.grad.numpy() for name, x in model.named_parameters()}
    for remat in ("none", "full"):
        value, gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, remat)
        assert abs(float(value) - total.item() / targets) < 1e-4
        ours = torch_arrays(config, jax.device_get(gradient), naming)
        assert ours.keys() == theirs.keys()
        for name, x in theirs.items():
            assert np.abs(ours[name] - x).max() <= 1e-4 * max(np.abs(x).max(), 1e-2), name
    return theirs
