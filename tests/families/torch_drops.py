"""PyramidDrop written plainly on top of a torch Qwen-VL: dropped tokens are deleted between its layers."""

import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb, repeat_kv


def drop_run(model, inputs, layers, ratios, *, positions="original", new_ids=(), query=None):
    """Runs a prompt and ``new_ids`` behind it with drops after ``layers``.

    Args:
      inputs: of one row, as transformers' processor makes them.
      query: slot whose attention ranks the image tokens; None is the last of the prompt.

    Returns:
      (logits (n, V) of what is left, [boundary][image] -> kept indices within the image).
    """
    ids, kinds = inputs["input_ids"], inputs["mm_token_type_ids"]
    query = ids.shape[1] - 1 if query is None else query
    ids = torch.cat([ids, torch.tensor([list(new_ids)], dtype=ids.dtype)], dim=1)
    kinds = torch.cat([kinds, torch.zeros(1, len(new_ids), dtype=kinds.dtype)], dim=1)
    inner, grids, clips = model.model, inputs.get("image_grid_thw"), inputs.get("video_grid_thw")
    hidden = inner.get_input_embeddings()(ids)
    where = torch.arange(ids.shape[1]).expand(3, 1, -1)
    if grids is not None:
        features = torch.cat(list(inner.get_image_features(inputs["pixel_values"], grids).pooler_output))
        hidden = hidden.masked_scatter((kinds == 1)[..., None], features)
    if clips is not None:
        features = torch.cat(list(inner.get_video_features(inputs["pixel_values_videos"], clips).pooler_output))
        hidden = hidden.masked_scatter((kinds == 2)[..., None], features)
    if grids is not None or clips is not None:
        where, _ = inner.get_rope_index(ids, kinds, grids, clips, second_per_grid_ts=inputs.get("second_per_grid_ts"))
    # Image of each token: runs of image tokens, counted from 1.
    shown = (kinds[0] > 0).long()
    image = torch.cumsum(torch.diff(shown, prepend=torch.zeros(1)) > 0, 0) * shown
    index, counts = torch.arange(ids.shape[1]), torch.bincount(image)
    starts = {m: int(torch.nonzero(image == m)[0]) for m in range(1, len(counts))}
    language, kept = inner.language_model, []
    for n, layer in enumerate(language.layers):
        if n in layers:
            at = layers.index(n)
            row = int((index <= query).sum()) - 1
            score = attention_from(layer, hidden, language.rotary_emb(hidden, where), row)
            keep, chosen = image == 0, []
            for m in range(1, len(counts)):
                slots = torch.nonzero(image == m)[:, 0]
                first = starts[m]
                best = sorted(slots.tolist(), key=lambda slot: -score[slot].item())[
                    : int(counts[m].item() * ratios[at])
                ]
                keep[best] = True
                chosen.append(sorted((index[best] - first).tolist()))
            kept.append(chosen)
            hidden, where, image, index = hidden[:, keep], where[..., keep], image[keep], index[keep]
            if positions == "dense":
                where = torch.arange(hidden.shape[1]).expand(3, 1, -1)
        out = layer(hidden, attention_mask=None, position_embeddings=language.rotary_emb(hidden, where))
        hidden = out[0] if isinstance(out, tuple) else out
    return model.lm_head(language.norm(hidden))[0], kept


def attention_from(layer, hidden, rope, row):
    """Attention of one row to every slot of a layer's input, mean over heads."""
    attention = layer.self_attn
    h = layer.input_layernorm(hidden)
    q, k = (
        p(h).view(1, h.shape[1], -1, attention.head_dim).transpose(1, 2) for p in (attention.q_proj, attention.k_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, *rope)
    logits = (q[:, :, row : row + 1] @ repeat_kv(k, attention.num_key_value_groups).transpose(2, 3)) * attention.scaling
    logits[..., row + 1 :] = -torch.inf
    return logits.softmax(-1)[0, :, 0].mean(0)
