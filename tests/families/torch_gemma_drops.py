"""PyramidDrop written plainly on top of a torch Gemma 3: dropped tokens are deleted between its layers.

What a token sees goes by slots before the drops and by pictures, as transformers builds its masks before any drop: a
deleted token is a deleted row and column.
"""

import torch
from transformers.models.gemma3.modeling_gemma3 import apply_rotary_pos_emb, repeat_kv


def drop_run(model, inputs, layers, ratios, *, positions="dense", new_ids=(), query=None):
    """Runs a prompt and ``new_ids`` behind it with drops after ``layers``.

    Args:
      inputs: of one row, as transformers' processor makes them.
      query: slot whose attention ranks the image tokens; None is the last of the prompt.

    Returns:
      (logits (n, V) of what is left, [boundary][image] -> kept indices within the image).
    """
    ids, shown = inputs["input_ids"], inputs["token_type_ids"][0]
    query = ids.shape[1] - 1 if query is None else query
    ids = torch.cat([ids, torch.tensor([list(new_ids)], dtype=ids.dtype)], dim=1)
    shown = torch.cat([shown, torch.zeros(len(new_ids), dtype=shown.dtype)])
    inner = model.model
    hidden = inner.get_input_embeddings()(ids)
    if "pixel_values" in inputs:
        features = inner.get_image_features(inputs["pixel_values"]).pooler_output
        hidden = hidden.masked_scatter((shown == 1)[None, :, None], features.flatten(0, 1))
    # Image of each token: runs of image tokens, counted from 1.
    image = torch.cumsum(torch.diff(shown, prepend=torch.zeros(1)) > 0, 0) * shown
    index, counts = torch.arange(ids.shape[1]), torch.bincount(image)
    starts = {m: int(torch.nonzero(image == m)[0]) for m in range(1, len(counts))}
    language, kept, where = inner.language_model, [], index[None]
    kinds, window = language.config.layer_types, language.config.sliding_window
    for n, layer in enumerate(language.layers):
        if n in layers:
            at = layers.index(n)
            row = int((index <= query).sum()) - 1
            mask = mask_of(kinds[n], index, image, window)
            score = attention_from(layer, hidden, language.rotary_emb(hidden, where, kinds[n]), row, mask)
            keep, chosen = image == 0, []
            for m in range(1, len(counts)):
                slots = torch.nonzero(image == m)[:, 0]
                best = sorted(slots.tolist(), key=lambda slot: -score[slot].item())
                best = best[: int(counts[m].item() * ratios[at])]
                keep[best] = True
                chosen.append(sorted((index[best] - starts[m]).tolist()))
            kept.append(chosen)
            hidden, where, image, index = hidden[:, keep], where[:, keep], image[keep], index[keep]
            if positions == "dense":
                where = torch.arange(hidden.shape[1])[None]
        mask = torch.where(mask_of(kinds[n], index, image, window), 0.0, -torch.inf)[None, None]
        rope = language.rotary_emb(hidden, where, kinds[n])
        out = layer(hidden, attention_mask=mask, position_embeddings=rope)
        hidden = out[0] if isinstance(out, tuple) else out
    return model.lm_head(language.norm(hidden))[0], kept


def mask_of(kind, index, image, window):
    """(n, n) bool: everything before, and the whole of a token's own picture, within the window if there is one."""
    query, key = index[:, None], index[None]
    seen = (key <= query) | ((image[:, None] == image[None]) & (image[None] > 0))
    return seen & (key > query - window) if kind == "sliding_attention" else seen


def attention_from(layer, hidden, rope, row, mask):
    """Attention of one row to every slot of a layer's input, mean over heads."""
    attention = layer.self_attn
    h = layer.input_layernorm(hidden)
    q, k = (
        norm(p(h).view(1, h.shape[1], -1, attention.head_dim)).transpose(1, 2)
        for p, norm in ((attention.q_proj, attention.q_norm), (attention.k_proj, attention.k_norm))
    )
    q, k = apply_rotary_pos_emb(q, k, *rope)
    logits = (q[:, :, row : row + 1] @ repeat_kv(k, attention.num_key_value_groups).transpose(2, 3)) * attention.scaling
    return logits.masked_fill(~mask[row], -torch.inf).softmax(-1)[0, :, 0].mean(0)
