"""Small models and a tokenizer that the tests of generation share."""

import zlib

import torch

from neural_layers.models.hybrid import HybridConfig, HybridForCausalLM

VOCABULARY = 40
MIXERS = {
    "mamba": ["mamba", "mamba"],
    "mamba2": ["mamba2", "mamba2"],
    "attention": ["attention", "attention"],
    "sliding": ["sliding_attention", "sliding_attention"],
    "hybrid": ["mamba", "attention", "mamba2", "sliding_attention"],
}
TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "a dog and a fox are friends, and the fox is quick",
    "User: where is the dog?\nAssistant: the dog is lazy and brown.\n",
    "größer, naïve, 東京, Привет, 🙂 and 👩‍🚀 are words of several bytes",
]


def make_model(mixers="hybrid", seed: int = 0, **changes) -> HybridForCausalLM:
    """A model in float64 that says many things: weights of its own, far from the small ones of an initialisation."""
    mixers = MIXERS.get(mixers, mixers) if isinstance(mixers, str) else mixers
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "mamba_d_state": 4, "mamba2_d_state": 8, "mamba2_head_dim": 8}
    sizes |= {"sliding_window": 5, "max_position_embeddings": 128, "num_hidden_layers": len(mixers)}
    sizes |= {"eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": False}
    model = HybridForCausalLM(HybridConfig(mixers=mixers, **{**sizes, **changes})).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Drawn for each name alone, so that another parameter or order of initialisation changes no other.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            parameter.copy_(_draw(name, parameter, generator))
    return model


def _draw(name: str, parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    if name.endswith("A_log"):
        return 0.5 * noise
    if "dt_" in name and name.endswith("bias"):
        return noise - 2.0
    if parameter.ndim < 2:
        return 0.3 * noise + (1.0 if "norm" in name or name.endswith("D") else 0.0)
    return noise * (1.0 if "embed" in name or "head" in name else 1.2 * parameter[0].numel() ** -0.5)


def make_ids(seed: int = 0, batch: int = 1, length: int = 9, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """Token ids (batch, length), none of them the padding 0."""
    return torch.randint(1, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def make_tokenizer(vocabulary: int = 300, **tokens):
    """Byte-level BPE learned from `TEXTS`; `<|endoftext|>` is 0 and begins, ends and pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", *tokens.pop("additional", [])]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    end = {"bos_token": special[0], "eos_token": special[0], "pad_token": special[0], **tokens}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", clean_up_tokenization_spaces=False, **end
    )
