"""Tiny transformers models of many families, made from a config: no download, no training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as t
from torch import nn

_USUAL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
}
_T5: dict[str, Any] = {
    "vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2
}  # fmt: skip
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GPT2 = t.GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, **_TOKENS)


def _modern_bert() -> nn.Module:
    config = t.ModernBertConfig(**_USUAL, **_TOKENS, cls_token_id=1, sep_token_id=2)
    return t.ModernBertForSequenceClassification(config)


def _deberta_with_all_parts() -> nn.Module:
    config = t.DebertaV2Config(
        **_USUAL,
        relative_attention=True,
        position_buckets=4,
        norm_rel_ebd="layer_norm",
        conv_kernel_size=3,
        pos_att_type=["p2c", "c2p"],
    )
    return t.DebertaV2ForSequenceClassification(config)


def _opt() -> nn.Module:
    config = t.OPTConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=3,
        ffn_dim=32,
        num_attention_heads=2,
        word_embed_proj_dim=8,
        max_position_embeddings=32,
        **_TOKENS,
    )
    return t.OPTForSequenceClassification(config)


def _bart() -> nn.Module:
    config = t.BartConfig(
        vocab_size=50,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=32,
        **_TOKENS,
    )
    return t.BartForSequenceClassification(config)


def _vit() -> nn.Module:
    sizes = {name: value for name, value in _USUAL.items() if name != "vocab_size"}
    return t.ViTForImageClassification(t.ViTConfig(**sizes, image_size=32, patch_size=16))


def _wav2vec2() -> nn.Module:
    config = t.Wav2Vec2Config(
        **_USUAL,
        conv_dim=(8, 8),
        conv_kernel=(3, 3),
        conv_stride=(2, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    return t.Wav2Vec2Model(config)


TRANSFORMERS: dict[str, Callable[[], nn.Module]] = {
    "bert-classification": lambda: t.BertForSequenceClassification(t.BertConfig(**_USUAL)),
    "bert-masked-lm": lambda: t.BertForMaskedLM(t.BertConfig(**_USUAL)),
    "bert-bare": lambda: t.BertModel(t.BertConfig(**_USUAL)),
    "bert-no-pooler": lambda: t.BertModel(t.BertConfig(**_USUAL), add_pooling_layer=False),
    "roberta": lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**_USUAL)),
    "distilbert": lambda: t.DistilBertForSequenceClassification(
        t.DistilBertConfig(vocab_size=50, dim=16, n_layers=3, n_heads=2, hidden_dim=32)
    ),
    "electra": lambda: t.ElectraForSequenceClassification(
        t.ElectraConfig(**_USUAL, embedding_size=8)
    ),
    "albert": lambda: t.AlbertForSequenceClassification(t.AlbertConfig(**_USUAL, embedding_size=8)),
    "deberta-v2": lambda: t.DebertaV2ForSequenceClassification(t.DebertaV2Config(**_USUAL)),
    "deberta-v2-all-parts": _deberta_with_all_parts,
    "mpnet": lambda: t.MPNetForSequenceClassification(t.MPNetConfig(**_USUAL)),
    "xlnet": lambda: t.XLNetForSequenceClassification(
        t.XLNetConfig(vocab_size=50, d_model=16, n_layer=3, n_head=2, d_inner=32)
    ),
    "gpt2-classification": lambda: t.GPT2ForSequenceClassification(_GPT2),
    "gpt2-lm": lambda: t.GPT2LMHeadModel(_GPT2),
    "t5-classification": lambda: t.T5ForSequenceClassification(t.T5Config(**_T5)),
    "t5-generation": lambda: t.T5ForConditionalGeneration(t.T5Config(**_T5)),
    "t5-encoder": lambda: t.T5EncoderModel(t.T5Config(**_T5)),
    "vit": _vit,
    "modernbert": _modern_bert,
    "llama-classification": lambda: t.LlamaForSequenceClassification(
        t.LlamaConfig(**_USUAL, **_TOKENS)
    ),
    "llama-lm": lambda: t.LlamaForCausalLM(t.LlamaConfig(**_USUAL, **_TOKENS)),
    "opt": _opt,
    "bart": _bart,
    "wav2vec2": _wav2vec2,
}


def tiny_bert(layers: int = 3, **kwargs: Any) -> t.BertForSequenceClassification:
    """A BERT with a classifier that is small and deep."""
    return t.BertForSequenceClassification(
        t.BertConfig(**{**_USUAL, "num_hidden_layers": layers, **kwargs})
    )


def tiny_bert_lm(layers: int = 3) -> t.BertForMaskedLM:
    """A BERT whose decoder and word embedding are one tensor."""
    return t.BertForMaskedLM(t.BertConfig(**{**_USUAL, "num_hidden_layers": layers}))
