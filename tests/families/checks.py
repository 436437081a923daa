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


def whole(model, session, question, pictures):
    """The whole conversation as the batch of one prefill."""
    row = model.processor.row([*session.turns, (question, None)], pictures)
    return assemble([row], model.config, choose_bucket([row], model.config, SAMPLING.max_new_tokens))


def at_once(model, session, question, pictures):
    """The answer to the whole conversation in one prefill."""
    return generate_batch(model, whole(model, session, question, pictures), SAMPLING)


def check_conversation(model, mode, turns):
    """Each of ``turns``, (question, pictures), is answered as if everything was asked at once.

    Returns:
      The buckets of the conversation as it grows; for each of them programs are compiled.
    """
    session, shown, buckets = Session(model, mode), [], set()
    for question, pictures in turns:
        shown += pictures
        batch = whole(model, session, "<image>" * len(pictures) + question, shown)
        buckets.add(batch.bucket)
        expected = generate_batch(model, batch, SAMPLING)
        answer = session.ask(question, pictures, SAMPLING)
        assert answer.token_ids == expected.token_ids[0]
        assert answer.kept == expected.kept[0]
        assert answer.stage_lengths == expected.stage_lengths[0]
    assert answer.cached > 0 or model.config.schedule.layers == (0,)
    return buckets


def check_drops(model, rows, run, new_tokens):
    """Logits, kept tokens and answers are those of a torch model whose tokens are deleted.

    Args:
      rows: (question, images).
      run: (row, new ids) -> (logits, kept tokens) of that model.
    """
    questions, images = zip(*rows, strict=True)
    batch = model.processor(list(questions), list(images))
    logits = jax.jit(forward, static_argnums=0)(model.config, model.params, batch).logits
    answers = generate(model, questions, images, Sampling(max_new_tokens=new_tokens))
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


def check_rows_alone(model, rows, alone):
    """A row keeps and answers the same alone and in a batch of ``rows``, (question, images).

    Args:
      alone: numbers of the rows that are asked alone too. Those of as many pictures share a bucket, which is smaller
        than the batch's unless they have the most.
    """
    questions, images = zip(*rows, strict=True)
    batch = generate(model, questions, images, SAMPLING)
    asked = {b: model.processor.row(*rows[b]) for b in alone}
    for b, row in asked.items():
        alike = [other for other in asked.values() if len(other.images) == len(row.images)]
        bucket = choose_bucket(alike, model.config, SAMPLING.max_new_tokens)
        found = generate_batch(model, assemble([row], model.config, bucket), SAMPLING)
        assert found.token_ids[0] == batch.token_ids[b]
        assert found.kept[0] == [[image for image in at if image] for at in batch.kept[b]]
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


def check_gradients(config, params, rows, answers, predictions, model, naming, remat):
    """The loss and every gradient are those of torch.

    Args:
      rows: of the prompts.
      answers: ids of each row's answer.
      predictions: logits (n, V) of torch's ``model`` for each answer's tokens.
      remat: what ``compute_loss`` computes again.

    Returns:
      torch's gradients by name.
    """
    targets = sum(map(len, answers))
    pairs = zip(predictions, answers, strict=True)
    total = sum(torch.nn.functional.cross_entropy(x, torch.tensor(new), reduction="sum") for x, new in pairs)
    (total / targets).backward()
    batch = assemble(rows, config, choose_bucket(rows, config))
    assert int(count_targets(batch.labels)) == targets

    def loss(params):
        return compute_loss(config, params, batch, remat=remat)[0] / targets

    theirs = {name: x.grad.numpy() for name, x in model.named_parameters()}
    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    assert abs(float(value) - total.item() / targets) < 1e-4
    ours = torch_arrays(config, jax.device_get(gradient), naming)
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert np.abs(ours[name] - x).max() <= 1e-4 * max(np.abs(x).max(), 1e-2), name
    return theirs
