"""The families as points of one `ModelConfig`, at their published sizes. Sizes only: weights come by `interop`, names by its maps.

Each preset takes changes by keyword: `bert(layers=2, head="classification")`.
"""

from typing import Any

from llm_jax.models.config import ModelConfig


def bert(**changes: Any) -> ModelConfig:
    """BERT-base, uncased: 109.48M with its pooler (Devlin et al. 2018)."""
    return ModelConfig(
        **{
            **dict(
                architecture="encoder",
                vocab_size=30522,
                max_length=512,
                layers=12,
                dim=768,
                heads=12,
                mlp_dim=3072,
                mlp="gelu",
                norm="layer",
                norm_place="post",
                norm_epsilon=1e-12,
                positions="learned",
                bias="all",
                embedding_norm=True,
                token_types=2,
                pooler="tanh",
                head="none",
                dropout=0.1,
            ),
            **changes,
        }
    )


def roberta(**changes: Any) -> ModelConfig:
    """RoBERTa-base: 124.06M without a head; its classifier's dense layer is the pooler (Liu et al. 2019)."""
    return bert(
        **{
            **dict(
                vocab_size=50265, max_length=512, position_offset=2, norm_epsilon=1e-5, token_types=1, pooler="none"
            ),
            **changes,
        }
    )


def distilbert(**changes: Any) -> ModelConfig:
    """DistilBERT-base: 66.36M, half of BERT's layers, no token types and no pooler (Sanh et al. 2019)."""
    return bert(**{**dict(layers=6, token_types=0, pooler="none"), **changes})


def gpt2(**changes: Any) -> ModelConfig:
    """GPT-2 small: 124.44M (Radford et al. 2019)."""
    return ModelConfig(
        **{
            **dict(
                architecture="decoder",
                vocab_size=50257,
                max_length=1024,
                layers=12,
                dim=768,
                heads=12,
                mlp="gelu_tanh",
                norm="layer",
                norm_epsilon=1e-5,
                positions="learned",
                bias="all",
                dropout=0.1,
            ),
            **changes,
        }
    )


def llama(**changes: Any) -> ModelConfig:
    """Llama 2 7B: 6,738.4M (Touvron et al. 2023). Mistral, SmolLM2, Qwen2 and Qwen3 are changes of it."""
    return ModelConfig(
        **{
            **dict(
                architecture="decoder",
                vocab_size=32000,
                max_length=4096,
                layers=32,
                dim=4096,
                heads=32,
                mlp_dim=11008,
                mlp="gated_silu",
                norm="rms",
                norm_epsilon=1e-5,
                positions="rotary",
                tie_embeddings=False,
            ),
            **changes,
        }
    )


def t5(**changes: Any) -> ModelConfig:
    """T5-small: 60.51M (Raffel et al. 2019)."""
    return ModelConfig(
        **{
            **dict(
                architecture="encoder-decoder",
                vocab_size=32128,
                max_length=512,
                layers=6,
                dim=512,
                heads=8,
                head_dim=64,
                mlp_dim=2048,
                mlp="relu",
                norm="rms",
                norm_epsilon=1e-6,
                positions="relative",
                attention_scale=False,
                logits_scale=True,
                dropout=0.1,
            ),
            **changes,
        }
    )


def marian(**changes: Any) -> ModelConfig:
    """The translation models of OPUS-MT in their usual size (Junczys-Dowmunt et al. 2018)."""
    return ModelConfig(
        **{
            **dict(
                architecture="encoder-decoder",
                vocab_size=58101,
                max_length=512,
                layers=6,
                dim=512,
                heads=8,
                mlp_dim=2048,
                mlp="silu",
                norm="layer",
                norm_place="post",
                positions="sinusoidal_split",
                bias="all",
                embedding_scale=True,
                logits_bias=True,
                dropout=0.1,
            ),
            **changes,
        }
    )


def vaswani(**changes: Any) -> ModelConfig:
    """The base model of 'Attention is all you need', table 3 (Vaswani et al. 2017)."""
    return ModelConfig(
        **{
            **dict(
                architecture="encoder-decoder",
                vocab_size=37000,
                max_length=512,
                layers=6,
                dim=512,
                heads=8,
                mlp_dim=2048,
                mlp="relu",
                norm="layer",
                norm_place="post",
                positions="sinusoidal",
                bias="all",
                embedding_scale=True,
                dropout=0.1,
            ),
            **changes,
        }
    )


def vit(**changes: Any) -> ModelConfig:
    """ViT-B/16 with 1,000 classes: 86.57M (Dosovitskiy et al. 2020)."""
    return ModelConfig(
        **{
            **dict(
                architecture="encoder",
                vocab_size=1,
                max_length=197,
                layers=12,
                dim=768,
                heads=12,
                mlp_dim=3072,
                mlp="gelu",
                norm="layer",
                norm_epsilon=1e-6,
                positions="learned",
                bias="all",
                head="classification",
                labels=1000,
                patch_size=16,
                image_size=224,
            ),
            **changes,
        }
    )
