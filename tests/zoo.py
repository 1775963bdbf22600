"""Tiny models for tests: one of every architecture family, and blocks written by hand.

`ZOO` maps a name to a factory of an HF model with random weights; `BLOCKS` maps a name to a
factory of a plain module and example inputs for it.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

VOCABULARY = 99
BASE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = {**BASE, "num_key_value_heads": 2}
GPT2_STYLE: dict[str, Any] = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": VOCABULARY,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEQ2SEQ: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def _decoders() -> dict[str, Callable[[], nn.Module]]:
    return {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
        "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=5)),
        "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED)),
        "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=8)),
        "gemma2": lambda: hf.Gemma2ForCausalLM(
            hf.Gemma2Config(**GROUPED, head_dim=8, sliding_window=5)
        ),
        "gemma3": lambda: hf.Gemma3ForCausalLM(
            hf.Gemma3TextConfig(
                **{**GROUPED, "num_hidden_layers": 3},
                head_dim=8,
                sliding_window=5,
                layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            )
        ),
        "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**BASE)),
        "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GROUPED)),
        "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**GROUPED)),
        "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**GROUPED)),
        "glm": lambda: hf.GlmForCausalLM(hf.GlmConfig(**GROUPED, head_dim=8)),
        "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**GROUPED)),
        "stablelm": lambda: hf.StableLmForCausalLM(hf.StableLmConfig(**GROUPED)),
        "starcoder2": lambda: hf.Starcoder2ForCausalLM(hf.Starcoder2Config(**GROUPED)),
        "gptneox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**BASE, rotary_pct=0.5)),
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2_STYLE)),
        "gptj": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**GPT2_STYLE, rotary_dim=4)),
        "codegen": lambda: hf.CodeGenForCausalLM(hf.CodeGenConfig(**GPT2_STYLE, rotary_dim=4)),
        "gptneo": lambda: hf.GPTNeoForCausalLM(
            hf.GPTNeoConfig(
                hidden_size=32,
                num_layers=2,
                num_heads=4,
                vocab_size=VOCABULARY,
                max_position_embeddings=128,
                attention_types=[[["global", "local"], 1]],
                window_size=5,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        "opt": lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                hidden_size=32,
                ffn_dim=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                vocab_size=VOCABULARY,
                max_position_embeddings=128,
                word_embed_proj_dim=32,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        "bloom": lambda: hf.BloomForCausalLM(
            hf.BloomConfig(
                hidden_size=32,
                n_layer=2,
                n_head=4,
                vocab_size=VOCABULARY,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        "falcon": lambda: hf.FalconForCausalLM(
            hf.FalconConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                vocab_size=VOCABULARY,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        "mpt": lambda: hf.MptForCausalLM(
            hf.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=VOCABULARY, max_seq_len=128)
        ),
        "mamba": lambda: hf.MambaForCausalLM(
            hf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=VOCABULARY)
        ),
    }


def _mixtures() -> dict[str, Callable[[], nn.Module]]:
    return {
        "mixtral": lambda: hf.MixtralForCausalLM(
            hf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)
        ),
        "qwen3moe": lambda: hf.Qwen3MoeForCausalLM(
            hf.Qwen3MoeConfig(
                **GROUPED,
                head_dim=8,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=16,
            )
        ),
        # Its forward does not name `use_cache` and passes it on.
        "granitemoe": lambda: hf.GraniteMoeForCausalLM(
            hf.GraniteMoeConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)
        ),
        "gptoss": lambda: hf.GptOssForCausalLM(
            hf.GptOssConfig(
                **GROUPED,
                head_dim=8,
                num_local_experts=4,
                num_experts_per_tok=2,
                sliding_window=5,
            )
        ),
        "llama4": lambda: hf.Llama4ForCausalLM(  # rotary embedding in complex numbers
            hf.Llama4TextConfig(
                **GROUPED,
                head_dim=8,
                intermediate_size_mlp=64,
                num_local_experts=4,
                attention_chunk_size=16,
            )
        ),
        "deepseekv3": lambda: hf.DeepseekV3ForCausalLM(
            hf.DeepseekV3Config(
                **BASE,
                n_routed_experts=4,
                num_experts_per_tok=2,
                n_group=2,
                topk_group=1,
                moe_intermediate_size=16,
                q_lora_rank=16,
                kv_lora_rank=16,
                qk_rope_head_dim=4,
                qk_nope_head_dim=8,
                v_head_dim=8,
            )
        ),
    }


def _encoders() -> dict[str, Callable[[], nn.Module]]:
    return {
        "bert": lambda: hf.BertModel(hf.BertConfig(**BASE)),
        "bertcls": lambda: hf.BertForSequenceClassification(hf.BertConfig(**BASE)),
        "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**BASE)),
        "electra": lambda: hf.ElectraModel(hf.ElectraConfig(**BASE, embedding_size=16)),
        "albert": lambda: hf.AlbertModel(hf.AlbertConfig(**BASE, embedding_size=16)),
        "deberta": lambda: hf.DebertaV2Model(hf.DebertaV2Config(**BASE)),
        # Its relative positions are cut out of a table at places that depend on a tensor's values.
        "debertav1": lambda: hf.DebertaModel(
            hf.DebertaConfig(**BASE, relative_attention=True, pos_att_type=["p2c", "c2p"])
        ),
        "modernbert": lambda: hf.ModernBertModel(
            hf.ModernBertConfig(
                **BASE,
                local_attention=6,
                global_attn_every_n_layers=2,
                cls_token_id=1,
                sep_token_id=2,
            )
        ),
        "distilbert": lambda: hf.DistilBertModel(
            hf.DistilBertConfig(
                dim=32,
                hidden_dim=64,
                n_layers=2,
                n_heads=4,
                vocab_size=VOCABULARY,
                max_position_embeddings=128,
            )
        ),
        "vit": lambda: hf.ViTModel(hf.ViTConfig(**VISION)),
        "dinov2": lambda: hf.Dinov2Model(
            hf.Dinov2Config(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=32,
                patch_size=8,
            )
        ),
        "clip": lambda: hf.CLIPModel(
            hf.CLIPConfig(
                text_config={**BASE, "max_position_embeddings": 32},
                vision_config=VISION,
                projection_dim=16,
            )
        ),
    }


def _sequence_to_sequence() -> dict[str, Callable[[], nn.Module]]:
    return {
        "t5": lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                vocab_size=VOCABULARY,
                pad_token_id=0,
                eos_token_id=2,
                decoder_start_token_id=0,
            )
        ),
        "bart": lambda: hf.BartForConditionalGeneration(
            hf.BartConfig(
                **SEQ2SEQ,
                max_position_embeddings=128,
                decoder_start_token_id=2,
                forced_eos_token_id=2,
            )
        ),
        "mbart": lambda: hf.MBartForConditionalGeneration(
            hf.MBartConfig(**SEQ2SEQ, max_position_embeddings=128)
        ),
        # Its encoder takes the batch size from the decoder's tokens in the captured graph.
        "m2m100": lambda: hf.M2M100ForConditionalGeneration(
            hf.M2M100Config(
                **{**SEQ2SEQ, "encoder_layers": 1, "decoder_layers": 1},
                max_position_embeddings=128,
                decoder_start_token_id=2,
            )
        ),
        "marian": lambda: hf.MarianMTModel(
            hf.MarianConfig(
                **SEQ2SEQ,
                max_position_embeddings=128,
                decoder_start_token_id=0,
                decoder_vocab_size=VOCABULARY,
            )
        ),
        "whisper": lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(
                **SEQ2SEQ,
                num_mel_bins=8,
                max_source_positions=30,
                max_target_positions=64,
                decoder_start_token_id=3,
                suppress_tokens=None,
                begin_suppress_tokens=None,
            )
        ),
    }


ZOO: dict[str, Callable[[], nn.Module]] = {
    **_decoders(),
    **_mixtures(),
    **_encoders(),
    **_sequence_to_sequence(),
}


# --- blocks written by hand -----------------------------------------------------------------


class OffsetRmsNorm(nn.Module):
    """Gemma's norm: the stored weight is the gain minus one."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.randn(width) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.float())).type_as(x)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def rotate_neighbours(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def rotary_table(length: Tensor, rotary: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    frequency = 10000.0 ** (-torch.arange(0, rotary, 2).float() / rotary)
    angle = length[:, None].float() * frequency
    angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat((angle, angle), -1)
    return angle.cos(), angle.sin()


class Decoder(nn.Module):
    """One pre-norm decoder block in which every part is written out.

    Rope turns `rotary` of the head's dimensions, in halves or in neighbouring pairs; keys and
    values have fewer heads; the mask is added, filled in, or absent.
    """

    def __init__(self, rotary: int = 8, interleaved: bool = False, mask: str = "add") -> None:
        super().__init__()
        self.rotary, self.interleaved, self.mask = rotary, interleaved, mask
        self.norm1, self.norm2 = OffsetRmsNorm(32), OffsetRmsNorm(32)
        self.q, self.o = nn.Linear(32, 32), nn.Linear(32, 32)
        self.k, self.v = nn.Linear(32, 16), nn.Linear(32, 16)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rotate = rotate_neighbours if self.interleaved else rotate_half
        part, rest = x[..., : self.rotary], x[..., self.rotary :]
        return torch.cat((part * cos + rotate(part) * sin, rest), -1)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], -1, 8).transpose(1, 2)

    def attend(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        cos, sin = rotary_table(torch.arange(length), self.rotary, self.interleaved)
        q, k = self.turn(q, cos, sin), self.turn(k, cos, sin)
        k, v = (
            t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(t.shape[0], 4, length, 8)
            for t in (k, v)
        )
        scores = torch.matmul(q, k.transpose(-1, -2)) / 8**0.5
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        lowest = torch.finfo(scores.dtype).min
        if self.mask == "add":
            scores = scores + torch.zeros(length, length).masked_fill(hidden, lowest)
        elif self.mask == "fill":
            scores = scores.masked_fill(hidden, -torch.inf)
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
        return self.o((weights @ v).transpose(1, 2).reshape(x.shape))

    def feed_forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        inner = 0.7978845608028654 * (h + 0.044715 * torch.pow(h, 3))
        return self.down(0.5 * h * (1 + torch.tanh(inner)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class SelfAttention(nn.Module):
    """nn.MultiheadAttention on one sequence; `weights` asks for its bmm form."""

    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.weights = weights
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=self.weights)[0]


def _layer(norm_first: bool) -> nn.TransformerEncoderLayer:
    activation = "gelu" if norm_first else "relu"
    return nn.TransformerEncoderLayer(
        32, 4, 64, batch_first=True, norm_first=norm_first, activation=activation
    )


def _sequence() -> tuple[Tensor, ...]:
    return (torch.randn(2, 5, 32),)


BLOCKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "pre_norm_layer": (lambda: _layer(True), _sequence),
    "post_norm_layer": (lambda: _layer(False), _sequence),
    "pre_norm_encoder": (
        lambda: nn.TransformerEncoder(_layer(True), 2, enable_nested_tensor=False),
        _sequence,
    ),
    "post_norm_encoder": (
        lambda: nn.TransformerEncoder(_layer(False), 2, enable_nested_tensor=False),
        _sequence,
    ),
    "multihead_sdpa": (lambda: SelfAttention(False), _sequence),
    "multihead_bmm": (lambda: SelfAttention(True), _sequence),
    "decoder": (Decoder, _sequence),
    "decoder_filled_mask": (lambda: Decoder(mask="fill"), _sequence),
    "decoder_no_mask": (lambda: Decoder(mask="none"), _sequence),
    "decoder_interleaved": (lambda: Decoder(interleaved=True), _sequence),
    "decoder_partial_rope": (lambda: Decoder(rotary=4), _sequence),
    "decoder_partial_interleaved": (lambda: Decoder(rotary=4, interleaved=True), _sequence),
}
