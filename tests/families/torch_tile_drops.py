"""PyramidDrop written plainly on top of a torch model with tiles: dropped tokens are deleted between its layers."""

import torch
from tiny_tiles import PLACE, TOKENS, family, tokenizer
from torch_drops import attention_from


def drop_run(kind, model, inputs, crops, layers, ratios, *, positions="dense", new_ids=()):
    """Runs a prompt and ``new_ids`` behind it with drops after ``layers``, ranked by the last token of the prompt.

    Args:
      inputs, crops: of one row, as ``tiny_tiles.torch_inputs`` makes them; all crops of a picture are one image.

    Returns:
      (logits (n, V) of what is left, [boundary][image] -> kept indices within the image).
    """
    query = inputs["input_ids"].shape[1] - 1
    ids = torch.cat([inputs["input_ids"], torch.tensor([list(new_ids)], dtype=inputs["input_ids"].dtype)], dim=1)
    shown = ids[0] == tokenizer(kind).convert_tokens_to_ids(PLACE[family(kind)])
    shown[query + 1 :] = False  # a model may answer with the token of a picture
    inner = model.model
    hidden = inner.get_input_embeddings()(ids)
    if crops:
        features = inner.get_image_features(inputs["pixel_values"]).pooler_output
        features = torch.cat([x.reshape(-1, hidden.shape[-1]) for x in features])
        hidden = hidden.masked_scatter(shown[None, :, None], features)
    image = torch.zeros(ids.shape[1], dtype=torch.long)
    counts = torch.tensor(crops, dtype=torch.long) * TOKENS[family(kind)]
    image[shown] = torch.repeat_interleave(torch.arange(1, len(crops) + 1), counts)
    index = torch.arange(ids.shape[1])
    within = {m: torch.cumsum(image == m, 0) - 1 for m in range(1, len(crops) + 1)}
    language = inner.language_model if hasattr(inner, "language_model") else inner.text_model
    kept, where = [], index[None]
    for n, layer in enumerate(language.layers):
        if n in layers:
            at = layers.index(n)
            row = int((index <= query).sum()) - 1
            score = attention_from(layer, hidden, language.rotary_emb(hidden, where), row)
            keep, chosen = image == 0, []
            for m, count in enumerate(counts.tolist(), 1):
                slots = torch.nonzero(image == m)[:, 0]
                best = sorted(slots.tolist(), key=lambda slot: -score[slot].item())[: int(count * ratios[at])]
                keep[best] = True
                chosen.append(sorted(within[m][index[best]].tolist()))
            kept.append(chosen)
            hidden, where, image, index = hidden[:, keep], where[:, keep], image[keep], index[keep]
            if positions == "dense":
                where = torch.arange(hidden.shape[1])[None]
        out = layer(hidden, attention_mask=None, position_embeddings=language.rotary_emb(hidden, where))
        hidden = out[0] if isinstance(out, tuple) else out
    return model.lm_head(language.norm(hidden))[0], kept
