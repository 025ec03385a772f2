"""Tensors that are left unread because no logit depends on them, as patterns of the whole name.

Every other tensor of a checkpoint is read, or the checkpoint is refused.
"""

from __future__ import annotations

HF_HARMLESS = (
    r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)",  # rotary frequencies, which the config gives
    r"(.*\.)?position_ids",  # 0, 1, 2, ...: a buffer of older versions of transformers
    r"(model\.)?decoder\.version",  # a format number of fairseq, in OPT
    # Images and sounds are not read.
    r"(model\.)?(vision_tower|vision_model|vision_encoder|visual|multi_modal_projector|connector)\..*",
    r"(model\.)?(image_tower|video_tower|audio_tower|vision_embedder|embed_vision|embed_audio)\..*",
    r"(model\.)?image_newline",
    r"(model\.)?(mtp|mtp_layers)\..*",  # layers that predict further tokens, beside the model itself
    r"(.*\.)?self_attn\.[qkv]_(scale|zero_point)",  # by which other engines store keys and values in fewer bits
)
GGUF_HARMLESS = (
    r"rope_(freqs|factors_short|factors_long)\.weight",  # rotary factors, which are read into the spec
    r"blk\.\d+\.attn_rot_embd(\.weight)?",  # rotary frequencies, which the metadata gives
    r"(v|mm)\..*",  # images are not read
)
