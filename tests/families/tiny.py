"""Any transformers model, small: its default config with few layers, or with all sizes small.

`few_layers` keeps every width, so that what a config demands of its sizes still holds; such a
model is built on the meta device. `small` makes a model that trains on the CPU in a moment.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# what a user would fine-tune a family for, in the order of preference
_TASKS = (
    "SEQUENCE_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "CTC",
    "CAUSAL_LM",
    "MASKED_LM",
    "OBJECT_DETECTION",
    "SEMANTIC_SEGMENTATION",
    "DEPTH_ESTIMATION",
    "VISUAL_QUESTION_ANSWERING",
    "TIME_SERIES_PREDICTION",
    "ZERO_SHOT_OBJECT_DETECTION",
    "PRETRAINING",
)
_DEPTH = re.compile(
    r"(num_hidden_layers|(n|num)_(encoder_|decoder_)?layers?|(encoder|decoder)_layers|depth"
    r"|num_decoder_layers|.*_num_(hidden_)?layers)"
)

_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size"), 16),
    **dict.fromkeys(("word_embed_proj_dim", "projection_dim", "embed_dim"), 16),
    **dict.fromkeys(("lru_width", "attention_hidden_size", "d_embed"), 16),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "attention_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "hidden_dim"), 32),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_inner", "moe_intermediate_size"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size", "ff_dim"), 32),
    **dict.fromkeys(("head_dim", "d_kv", "rotary_dim", "v_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_head_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "n_group", "topk_group", "n_shared_experts"), 2),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 60),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions"), 64),
    **dict.fromkeys(("image_size",), 32),
    "patch_size": 8,
    "num_mel_bins": 16,
    "max_length": 64,
    "conv_dim": [8, 8],
    "conv_kernel": [3, 3],
    "conv_stride": [2, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "hidden_sizes": [8, 16, 24, 32],
    **dict.fromkeys(("layerdrop", "encoder_layerdrop", "decoder_layerdrop"), 0.0),
    "hidden_dropout_prob": 0.0,
    "frequency_stride": 8,
    "time_stride": 8,
    "n_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "attn_layers": ["local", "lsh", "local"],
}  # fmt: skip


def task_class(family: str) -> Any:
    """The class that a user would fine-tune a family with."""
    tables = [f"MODEL_FOR_{task}_MAPPING_NAMES" for task in _TASKS] + ["MODEL_MAPPING_NAMES"]
    for table in tables:
        names = getattr(modeling_auto, table).get(family)
        if names is not None:
            return getattr(transformers, names if isinstance(names, str) else names[0])
    raise LookupError(f"transformers has no class for {family}")


def _sizes(config: Any) -> Iterator[tuple[Any, str, Any]]:
    """Each (config, name, value) of a config and those inside it."""
    for key, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _sizes(value)
        else:
            yield config, key.lstrip("_"), value


def depths(config: Any) -> list[int]:
    """The numbers of layers that a config names: one for each tower, and for its decoder."""
    found = []
    for _, key, value in _sizes(config):
        if _DEPTH.fullmatch(key) and isinstance(value, int) and not isinstance(value, bool):
            found.append(value)
        elif key == "depths" and isinstance(value, (list, tuple)):
            found.append(len(value))
    return found


def few_layers(family: str) -> Any:
    """The default config with at most four layers a tower, and three a decoder."""
    config = CONFIG_MAPPING[family]()
    for owner, key, value in _sizes(config):
        if _DEPTH.fullmatch(key) and isinstance(value, int) and not isinstance(value, bool):
            most = 3 if "decoder" in key else 4
            if value > most:
                setattr(owner, key, most)
    return config


def on_meta(family: str) -> nn.Module:
    """A family's model on the meta device, tied as the real one."""
    kind = task_class(family)
    try:
        config = few_layers(family)
        with torch.device("meta"), no_init_weights():
            model = kind(config)
    except (ValueError, TypeError, IndexError, AttributeError, KeyError, AssertionError):
        with torch.device("meta"), no_init_weights():  # its sizes depend on the number of layers
            model = kind(CONFIG_MAPPING[family]())
    model.tie_weights()
    return model


def small(family: str, **more: Any) -> nn.Module:
    """A family's model with random weights that trains in a moment."""
    config = few_layers(family)
    for owner, key, value in _sizes(config):
        if _DEPTH.fullmatch(key) and isinstance(value, int) and value > 2:
            setattr(owner, key, 2)
        elif key in _SMALL and value is not None:
            new = _SMALL[key]
            if isinstance(value, (list, tuple)) != isinstance(new, list):
                continue
            setattr(owner, key, type(value)(new) if isinstance(new, list) else new)
        elif key.endswith("token_id") and (isinstance(value, int) or key in _TOKENS):
            setattr(owner, key, _TOKENS.get(key, 2))
    if getattr(config, "is_encoder_decoder", False):
        config.decoder_start_token_id = 1
    for key, value in more.items():
        setattr(config, key, value)
    config.use_cache = False
    if getattr(config, "pad_token_id", 0) is None:
        config.pad_token_id = 0
    return task_class(family)(config)
