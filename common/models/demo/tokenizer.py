"""The demo model's own small tokenizer: byte-pair encoding learnt from captions, with bytes for all it never saw."""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from common.models.demo.captions import training_caption
from common.models.demo.clips import sample_subject

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
_CAPTIONS = 20_000
_VOCABULARY = 1024


def train_tokenizer(rng: np.random.Generator, max_tokens: int) -> PreTrainedTokenizerFast:
    """Learn the vocabulary from drawn captions. Text is lower-cased; ids 0, 1, 2 are pad, end and unknown."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip(), normalizers.Replace("  ", " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        min_frequency=40,
        special_tokens=[PAD, END, UNKNOWN, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=[*letters, *"0123456789.,!?'-"],
        show_progress=False,
    )
    tokenizer.train_from_iterator((training_caption(sample_subject(rng), rng) for _ in range(_CAPTIONS)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=max_tokens,
        padding_side="right",
        truncation_side="right",
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer
