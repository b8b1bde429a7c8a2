"""The demo language model's architecture and its training budget."""

from pathlib import Path

from transformers import LlamaConfig

from common.models.demo_language.tokenizer import END, PAD, SPECIAL_TOKENS

NAME = "triptych-demo-language"
WEIGHTS = Path(__file__).parent / "weights"
"""The folder of the shipped model."""

VOCABULARY = 1536
TRAINED_TOKENS = 128
"""The longest conversation of the training, in tokens; rows of a batch are as long."""
ROWS = 16
STEPS = 1600
MATRIX_LR, OTHER_LR = 0.02, 0.004
AVERAGE_DECAY = 0.99


def llama_config() -> LlamaConfig:
    """Four layers of grouped-query attention, embeddings shared with the head."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        bos_token_id=None,
        eos_token_id=SPECIAL_TOKENS.index(END),
    )
