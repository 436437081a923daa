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
    where, early = torch.arange(ids.shape[1]).expand(3, 1, -1), []
    for kind, given, read in ((1, grids, inner.get_image_features), (2, clips, inner.get_video_features)):
        if given is not None:
            found = read(inputs["pixel_values" if kind == 1 else "pixel_values_videos"], given)
            hidden = hidden.masked_scatter((kinds == kind)[..., None], torch.cat(list(found.pooler_output)))
            deep = getattr(found, "deepstack_features", None) or []
            early = early or [torch.zeros_like(hidden) for _ in deep]
            early = [
                x.masked_scatter((kinds == kind)[..., None], torch.cat(list(own)))
                for x, own in zip(early, deep, strict=True)
            ]
    if grids is not None or clips is not None:
        where, _ = inner.get_rope_index(ids, kinds, grids, clips, second_per_grid_ts=inputs.get("second_per_grid_ts"))
    # Image of each token: runs of image tokens, counted from 1. The steps of a clip are one image, text between or not.
    shown = (kinds[0] > 0).long()
    image = torch.cumsum(torch.diff(shown, prepend=torch.zeros(1)) > 0, 0) * shown
    if clips is not None:
        image[kinds[0] == 2] = image[kinds[0] == 2].min()
    index, counts = torch.arange(ids.shape[1]), torch.bincount(image)
    within = (torch.cumsum(image == m, 0) - 1 for m in range(1, len(counts)))
    within = dict(enumerate(within, 1))
    language, kept = inner.language_model, []
    for n, layer in enumerate(language.layers):
        if n in layers:
            at = layers.index(n)
            row = int((index <= query).sum()) - 1
            score = attention_from(layer, hidden, language.rotary_emb(hidden, where), row)
            keep, chosen = image == 0, []
            for m in range(1, len(counts)):
                slots = torch.nonzero(image == m)[:, 0]
                best = sorted(slots.tolist(), key=lambda slot: -score[slot].item())[
                    : int(counts[m].item() * ratios[at])
                ]
                keep[best] = True
                chosen.append(sorted(within[m][index[best]].tolist()))
            kept.append(chosen)
            hidden, where, image, index = hidden[:, keep], where[..., keep], image[keep], index[keep]
            early = [x[:, keep] for x in early]
            if positions == "dense":
                where = torch.arange(hidden.shape[1]).expand(3, 1, -1)
        out = layer(hidden, attention_mask=None, position_embeddings=language.rotary_emb(hidden, where))
        hidden = out[0] if isinstance(out, tuple) else out
        if n < len(early):
            hidden = hidden + early[n]
    return model.lm_head(language.norm(hidden))[0], kept


def attention_from(layer, hidden, rope, row):
    """Attention of one row to every slot of a layer's input, mean over heads."""
    attention = layer.self_attn
    h = layer.input_layernorm(hidden)
    q, k = (p(h).view(1, h.shape[1], -1, attention.head_dim) for p in (attention.q_proj, attention.k_proj))
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    q, k = apply_rotary_pos_emb(q, k, *rope)
    logits = (q[:, :, row : row + 1] @ repeat_kv(k, attention.num_key_value_groups).transpose(2, 3)) * attention.scaling
    logits[..., row + 1 :] = -torch.inf
    return logits.softmax(-1)[0, :, 0].mean(0)
