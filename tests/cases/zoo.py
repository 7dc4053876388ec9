"""Tiny random models of real architectures, each with a batch of three samples; one builder for each in a table.

Nothing is downloaded: the models are built from configurations, 2 layers deep and 8 to 32 wide.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import peft
import pytest
import timm
import torch
import torchvision
import transformers
from peft import LoraConfig, get_peft_model
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from torch import Tensor, nn
from torchvision.models import swin_transformer

from ..models import Net

SAMPLES = 3
LENGTH = 6
VOCAB = 40


@dataclass
class Specimen:
    """A model, the inputs of three samples, and the tensor of the output that the loss is on."""

    model: nn.Module
    inputs: dict[str, Tensor]
    read: Callable[[Any], Tensor]
    dtype: torch.dtype = torch.float64


Builder = Callable[[], Specimen]


def randn(*shape: int) -> Tensor:
    return torch.randn(SAMPLES, *shape)


def ids(length: int = LENGTH, low: int = 5, high: int = VOCAB) -> Tensor:
    return torch.randint(low, high, (SAMPLES, length))


def mask(length: int = LENGTH) -> Tensor:
    """Samples of different length, the padding on the right."""
    return (torch.arange(length) < torch.tensor([length, length - 2, length // 2])[:, None]).long()


def text(length: int = LENGTH) -> dict[str, Tensor]:
    return {"input_ids": ids(length) * mask(length), "attention_mask": mask(length)}


def unpadded() -> dict[str, Tensor]:
    return {"input_ids": ids()}


def text_pair() -> dict[str, Tensor]:
    return {**text(), "decoder_input_ids": ids(4)}


def image(size: int = 16) -> dict[str, Tensor]:
    return {"pixel_values": randn(3, size, size)}


def image_and_text(size: int = 16) -> dict[str, Tensor]:
    return {**text(), **image(size)}


def waveform() -> dict[str, Tensor]:
    return {"input_values": randn(200)}


def every(value: Any, names: str) -> dict[str, Any]:
    """Return settings that all have one value."""
    return dict.fromkeys(names.split(), value)


WIDE = every(2, "num_hidden_layers num_attention_heads") | {"hidden_size": 16, "intermediate_size": 24}
IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
STILL = every(0.0, "hidden_dropout_prob attention_probs_dropout_prob")
TEXT = {**WIDE, **IDS, **STILL, "max_position_embeddings": 32, "num_labels": 3}
DECODER = WIDE | IDS | {"max_position_embeddings": 32, "num_key_value_heads": 1, "head_dim": 8}
DECODER |= {"attention_dropout": 0.0, "use_cache": False}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
IMAGE = {**WIDE, **STILL, "image_size": 16, "patch_size": 8, "num_labels": 3, "attention_dropout": 0.0}
AUDIO = (
    WIDE
    | STILL
    | every(0.0, "activation_dropout attention_dropout hidden_dropout feat_proj_dropout final_dropout layerdrop")
    | {"vocab_size": 12, "conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2}
    | {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    | {"apply_spec_augment": False, "mask_time_prob": 0.0}
)
SEQ2SEQ = (
    IDS
    | {"d_model": 16, "max_position_embeddings": 32, "decoder_start_token_id": 1, "forced_eos_token_id": None}
    | every(1, "encoder_layers decoder_layers")
    | every(2, "encoder_attention_heads decoder_attention_heads")
    | every(24, "encoder_ffn_dim decoder_ffn_dim")
    | every(0.0, "dropout attention_dropout activation_dropout")
    | {"use_cache": False}
)


def first(output: Any) -> Tensor:
    """Read the first output, which is what a model is named after: logits, or hidden states."""
    return output if isinstance(output, Tensor) else output[0]


def hf(
    model: str,
    config: dict[str, Any],
    inputs: Callable[[], dict[str, Tensor]] = text,
    read: Callable[[Any], Tensor] = first,
    attention: str | None = None,
    **more: Any,
) -> Builder:
    """Return a builder for a class of transformers; its test is skipped where that is too old to have it."""

    def build() -> Specimen:
        kind = getattr(transformers, model, None)
        if kind is None:
            pytest.skip(f"transformers {transformers.__version__} has no {model}")
        settings = kind.config_class(**{**config, **more})
        if attention is not None:
            settings._attn_implementation = attention
        return Specimen(kind(settings), inputs(), read)

    return build


def single_precision(builder: Builder) -> Builder:
    """Return a builder for a model that runs in float32 only."""
    return lambda: replace(builder(), dtype=torch.float32)


def checkpointed(builder: Builder) -> Builder:
    def build() -> Specimen:
        specimen = builder()
        specimen.model.gradient_checkpointing_enable({"use_reentrant": False})
        return specimen

    return build


def encoder_decoder() -> Specimen:
    encoder = transformers.BertConfig(**TEXT)
    decoder = transformers.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    model = transformers.EncoderDecoderModel(encoder=transformers.BertModel(encoder), decoder=transformers.BertLMHeadModel(decoder))
    return Specimen(model, text_pair(), first)


CLIP_TEXT = {**TEXT, "projection_dim": 8, "attention_dropout": 0.0}
CLIP_IMAGE = {**IMAGE, "projection_dim": 8}
CLIP = {"text_config": CLIP_TEXT, "vision_config": CLIP_IMAGE, "projection_dim": 8}


def embeddings(output: Any) -> Tensor:
    """Read the two embeddings of each sample, without the logits of every image with every text."""
    return torch.cat([output.text_embeds, output.image_embeds], -1)


def only(read: Callable[[Any], Tensor], builder: Builder) -> Builder:
    """Return a builder for a model whose one output is what ``read`` takes from the outputs of the other one."""

    def build() -> Specimen:
        specimen = builder()
        return replace(specimen, model=Net(lambda s, **inputs: read(s.net(**inputs)), net=specimen.model), read=first)

    return build


SHORT = {"max_position_embeddings": 32, "use_cache": False}
BARE = WIDE | IDS | SHORT
GPT = {**IDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "use_cache": False}
GPT_STILL = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
BART = {**SEQ2SEQ, "num_labels": 3}
T5 = (
    IDS
    | {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0, "use_cache": False}
    | {"relative_attention_num_buckets": 4, "relative_attention_max_distance": 8, "decoder_start_token_id": 0}
)
DEBERTA = {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8}
SWIN = (
    STILL
    | {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4}
    | {"drop_path_rate": 0.0, "num_labels": 3}
)
CONVNEXT = every([1, 1], "depths") | {"hidden_sizes": [8, 12], "num_stages": 2, "patch_size": 4, "image_size": 16}
CONVNEXT |= {"num_labels": 3}
STATE = {**IDS, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "conv_kernel": 3, "use_cache": False}
SQUEEZED = {f"{name}_groups": 2 for name in ("q", "k", "v", "intermediate", "output")} | {"post_attention_groups": 1}
MIXTRAL = hf("MixtralForCausalLM", {**DECODER, **EXPERTS}, num_local_experts=3, sliding_window=None)
JETMOE = {"num_key_value_heads": 1, "kv_channels": 8, "num_local_experts": 3, "num_experts_per_tok": 2}

ENCODERS: dict[str, Builder] = {
    "bert-mlm": hf("BertForMaskedLM", TEXT),
    "bert-classifier-eager": hf("BertForSequenceClassification", TEXT, attention="eager"),
    "bert-checkpointed": checkpointed(hf("BertForSequenceClassification", TEXT)),
    "roberta-tokens": hf("RobertaForTokenClassification", TEXT),
    "albert": hf("AlbertForMaskedLM", TEXT, embedding_size=8),
    "distilbert": hf(
        "DistilBertForMaskedLM",
        {**IDS, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "dropout": 0.0, "attention_dropout": 0.0},
        max_position_embeddings=32,
    ),
    "electra": hf("ElectraForMaskedLM", TEXT, embedding_size=8),
    "deberta-v2": hf("DebertaV2ForMaskedLM", DEBERTA, position_buckets=4, norm_rel_ebd="layer_norm", share_att_key=True),
    "deberta": hf("DebertaForMaskedLM", DEBERTA),
    "mpnet": hf("MPNetForMaskedLM", TEXT, relative_attention_num_buckets=32),
    "xlnet": hf("XLNetLMHeadModel", {**IDS, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, "dropout": 0.0}),
    "funnel": hf(
        "FunnelForMaskedLM",
        {**IDS, "block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24},
        **every(0.0, "hidden_dropout attention_dropout activation_dropout"),
    ),
    "convbert": hf("ConvBertForMaskedLM", TEXT, embedding_size=8, conv_kernel_size=3, head_ratio=2),
    "modernbert": hf(
        "ModernBertForMaskedLM",
        {**BARE, "local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "longformer": hf("LongformerForMaskedLM", TEXT, lambda: {"input_ids": ids(8)}, attention_window=4),
    "mobilebert": hf("MobileBertForMaskedLM", TEXT, embedding_size=8, intra_bottleneck_size=8, true_hidden_size=8),
    "squeezebert": hf("SqueezeBertForMaskedLM", TEXT, embedding_size=16, **SQUEEZED),
    "fnet": hf("FNetForMaskedLM", {**WIDE, **IDS, "max_position_embeddings": 32, "hidden_dropout_prob": 0.0}, unpadded),
}

CAUSAL: dict[str, Builder] = {
    "gpt2": hf("GPT2LMHeadModel", {**GPT, **GPT_STILL}),
    "gpt2-checkpointed": checkpointed(hf("GPT2LMHeadModel", {**GPT, **GPT_STILL})),
    "gpt-neo": hf(
        "GPTNeoForCausalLM",
        {**IDS, **SHORT, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24, "window_size": 4},
        attention_types=[[["global", "local"], 1]],
    ),
    "gptj": hf("GPTJForCausalLM", {**GPT, **GPT_STILL, "rotary_dim": 4}),
    "gpt-neox": hf("GPTNeoXForCausalLM", BARE),
    "opt": hf("OPTForCausalLM", {**DECODER, "ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0}),
    "bloom": hf(
        "BloomForCausalLM",
        {**IDS, "hidden_size": 16, "n_layer": 2, "n_head": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0},
        use_cache=False,
    ),
    "llama": hf("LlamaForCausalLM", DECODER),
    "llama-tied-eager": hf("LlamaForCausalLM", DECODER, attention="eager", tie_word_embeddings=True),
    "mistral": hf("MistralForCausalLM", DECODER, sliding_window=4),
    "mixtral": single_precision(MIXTRAL),
    "qwen2": hf("Qwen2ForCausalLM", DECODER),
    "qwen3": hf("Qwen3ForCausalLM", DECODER),
    "qwen2-moe": single_precision(hf("Qwen2MoeForCausalLM", {**DECODER, **EXPERTS}, num_experts=3)),
    "jetmoe": single_precision(hf("JetMoeForCausalLM", BARE, **JETMOE)),
    "gemma": hf("GemmaForCausalLM", DECODER),
    "gemma2": hf("Gemma2ForCausalLM", DECODER, query_pre_attn_scalar=8, sliding_window=4),
    "gemma3": hf("Gemma3ForCausalLM", DECODER, query_pre_attn_scalar=8, sliding_window=4),
    "phi": hf("PhiForCausalLM", DECODER, num_key_value_heads=2, resid_pdrop=0.0, embd_pdrop=0.0),
    "falcon": hf("FalconForCausalLM", BARE, hidden_dropout=0.0, attention_dropout=0.0),
    "olmo": hf("OlmoForCausalLM", DECODER),
    "mamba": hf("MambaForCausalLM", STATE, unpadded, time_step_rank=4),
    "mamba2": hf("Mamba2ForCausalLM", STATE, unpadded, num_heads=4, head_dim=8, n_groups=1, expand=2, chunk_size=4),
    "rwkv": hf(
        "RwkvForCausalLM",
        {**IDS, "hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24},
        unpadded,
        **{"context_length": 16, "rescale_every": 0, "use_cache": False},
    ),
    "recurrent-gemma": hf(
        "RecurrentGemmaForCausalLM",
        {**DECODER, "lru_width": 16, "attention_window_size": 4, "conv1d_width": 3},
        block_types=["recurrent", "attention"],
    ),
}

SEQ2SEQS: dict[str, Builder] = {
    "t5": hf("T5ForConditionalGeneration", T5, text_pair),
    "t5-encoder": hf("T5EncoderModel", T5),
    "bart": hf("BartForConditionalGeneration", BART, text_pair),
    "pegasus": hf("PegasusForConditionalGeneration", BART, text_pair),
    "marian": hf("MarianMTModel", BART, text_pair),
    "m2m100": hf("M2M100ForConditionalGeneration", {**BART, "encoder_layerdrop": 0.0}, text_pair, decoder_layerdrop=0.0),
    "bert-to-bert": encoder_decoder,
}

VISION: dict[str, Builder] = {
    "vit": hf("ViTForImageClassification", IMAGE, image),
    "deit": hf("DeiTForImageClassification", IMAGE, image),
    "beit": hf("BeitForImageClassification", IMAGE, image, use_relative_position_bias=True, drop_path_rate=0.0, vocab_size=8),
    "swin": hf("SwinForImageClassification", SWIN, image),
    "swinv2": hf("Swinv2ForImageClassification", SWIN, image),
    "convnext": hf("ConvNextForImageClassification", CONVNEXT, image),
    "convnextv2": hf("ConvNextV2ForImageClassification", CONVNEXT, image),
    "dinov2": hf("Dinov2ForImageClassification", IMAGE, image, layerscale_value=0.5),
    "segformer": hf(
        "SegformerForImageClassification",
        {**STILL, "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 12]},
        image,
        **{"patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]},
        **{"drop_path_rate": 0.0, "num_labels": 3},
    ),
    "poolformer": hf(
        "PoolFormerForImageClassification",
        {"hidden_sizes": [8, 12], "depths": [1, 1], "num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2]},
        image,
        **{"padding": [2, 1], "mlp_ratio": 2.0, "drop_path_rate": 0.0, "num_labels": 3},
    ),
}

SOUND: dict[str, Builder] = {
    "wav2vec2": hf("Wav2Vec2ForCTC", AUDIO, waveform),
    "wav2vec2-stable": hf("Wav2Vec2ForCTC", AUDIO, waveform, feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True),
    "hubert": hf("HubertForCTC", AUDIO, waveform),
    "whisper": hf(
        "WhisperForConditionalGeneration",
        {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 8},
        lambda: {"input_features": randn(8, 16), "decoder_input_ids": ids(4)},
        suppress_tokens=None,
        begin_suppress_tokens=None,
    ),
    "ast": hf(
        "ASTForAudioClassification",
        WIDE | STILL | every(4, "patch_size time_stride frequency_stride") | {"max_length": 16, "num_mel_bins": 8},
        lambda: {"input_values": randn(16, 8)},
        num_labels=3,
    ),
}

MULTIMODAL: dict[str, Builder] = {
    "clip-text": hf("CLIPTextModelWithProjection", CLIP_TEXT),
    "clip-vision": hf("CLIPVisionModelWithProjection", CLIP_IMAGE, image),
    "clip-embeddings": only(embeddings, hf("CLIPModel", CLIP, image_and_text)),
    "siglip-vision": hf("SiglipVisionModel", IMAGE, image),
    "blip-captions": hf(
        "BlipForConditionalGeneration",
        {"text_config": {**TEXT, "encoder_hidden_size": 16, "use_cache": False}, "vision_config": IMAGE},
        image_and_text,
        read=lambda output: output.logits,
    ),
    "vilt": hf("ViltForQuestionAnswering", {**TEXT, **IMAGE, "max_image_length": -1}, image_and_text),
}


def pictures(model: Callable[[], nn.Module], size: int = 16) -> Builder:
    """Return a builder for a network on images; ``model()`` makes it."""
    return lambda: Specimen(Net(lambda s, x: s.net(x), net=model()), {"x": randn(3, size, size)}, first)


def timm_model(name: str, size: int = 16, **settings: Any) -> Builder:
    return pictures(lambda: timm.create_model(name, pretrained=False, num_classes=3, **settings), size)


PATCHES = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
WINDOWS = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (2, 1), "num_heads": (2, 2)}
STAGES = {"depths": (1, 1, 1, 1), "dims": (8, 8, 12, 12)}
MIXER = {"num_classes": 3, "img_size": 16, "patch_size": 8, "num_blocks": 2, "embed_dim": 16}

TIMM: dict[str, Builder] = {
    "timm-vit": timm_model("vit_tiny_patch16_224", **PATCHES),
    "timm-vit-relpos": timm_model("vit_relpos_small_patch16_224", **PATCHES),
    "timm-deit3": timm_model("deit3_small_patch16_224", **PATCHES),
    "timm-eva02": timm_model("eva02_tiny_patch14_224", **PATCHES),
    "timm-beit": timm_model("beit_base_patch16_224", **PATCHES),
    "timm-cait": timm_model("cait_xxs24_224", **PATCHES),
    "timm-convnext": timm_model("convnext_atto", 32, **STAGES),
    "timm-swin": timm_model("swin_tiny_patch4_window7_224", **WINDOWS),
    "timm-swinv2": timm_model("swinv2_tiny_window8_256", **WINDOWS),
    "timm-mixer": pictures(lambda: MlpMixer(**MIXER)),
    "timm-resmlp": pictures(lambda: MlpMixer(block_layer=ResBlock, norm_layer=Affine, mlp_ratio=2, **MIXER)),
    "timm-mambaout": timm_model("mambaout_femto", 32, **STAGES),
}


def residual(norm: Any) -> nn.Module:
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3, norm_layer=norm)


SWIN_SIZES = [2, 2], 8, [2, 1], [2, 2], [4, 4]
SWIN_ENDS = {"stochastic_depth_prob": 0.0, "num_classes": 3}

TORCHVISION: dict[str, Builder] = {
    "resnet-groupnorm": pictures(lambda: residual(lambda channels: nn.GroupNorm(4, channels))),
    "torchvision-vit": pictures(lambda: torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 24, num_classes=3)),
    "torchvision-swin": pictures(lambda: swin_transformer.SwinTransformer(*SWIN_SIZES, **SWIN_ENDS)),
    "torchvision-swin-v2": pictures(
        lambda: swin_transformer.SwinTransformer(
            *SWIN_SIZES,
            **SWIN_ENDS,
            block=swin_transformer.SwinTransformerBlockV2,
            downsample_layer=swin_transformer.PatchMergingV2,
        )
    ),
    "torchvision-convnext": pictures(
        lambda: torchvision.models.convnext.ConvNeXt(
            [torchvision.models.convnext.CNBlockConfig(8, 12, 1), torchvision.models.convnext.CNBlockConfig(12, None, 1)],
            stochastic_depth_prob=0.0,
            num_classes=3,
        )
    ),
}


def adapted(base: Builder, config: Callable[[], Any]) -> Builder:
    """Return a builder for ``base`` with the adapter of ``config()`` on it."""

    def build() -> Specimen:
        specimen = base()
        return replace(specimen, model=get_peft_model(specimen.model, config()))

    return build


def lora(*targets: str, **settings: Any) -> Callable[[], Any]:
    return lambda: LoraConfig(r=2, lora_alpha=4, target_modules=list(targets), init_lora_weights=False, **settings)


LLAMA = CAUSAL["llama"]
VIRTUAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2}

PEFT: dict[str, Builder] = {
    "lora-bert-classifier": adapted(ENCODERS["bert-classifier-eager"], lora("query", "value", task_type="SEQ_CLS")),
    "lora-gpt2": adapted(CAUSAL["gpt2"], lora("c_attn", fan_in_fan_out=True)),
    "lora-llama": adapted(LLAMA, lora("q_proj", "v_proj", "down_proj")),
    "lora-embedding": adapted(LLAMA, lora("embed_tokens", "q_proj")),
    "lora-conv": adapted(VISION["segformer"], lora("proj", "query")),
    "lora-grouped-conv": adapted(VISION["convnext"], lambda: LoraConfig(r=24, target_modules=["dwconv"], init_lora_weights=False)),
    "lora-saved-head": adapted(VISION["vit"], lora("q_proj", "query", modules_to_save=["classifier"])),
    "lora-mixtral": adapted(CAUSAL["mixtral"], lora("q_proj", "v_proj")),
    "dora-llama": adapted(LLAMA, lora("q_proj", "v_proj", use_dora=True)),
    "ia3-llama": adapted(
        LLAMA,
        lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False),
    ),
    "prompt-llama": adapted(LLAMA, lambda: peft.PromptTuningConfig(**VIRTUAL)),
    "prefix-llama": adapted(LLAMA, lambda: peft.PrefixTuningConfig(**VIRTUAL)),
    "p-tuning-llama": adapted(LLAMA, lambda: peft.PromptEncoderConfig(**VIRTUAL, encoder_hidden_size=8)),
    "vera-llama": adapted(LLAMA, lambda: peft.VeraConfig(r=2, target_modules=["q_proj"], init_weights=False)),
    "loha-llama": adapted(LLAMA, lambda: peft.LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False)),
    "lokr-llama": adapted(LLAMA, lambda: peft.LoKrConfig(r=2, target_modules=["q_proj"], init_weights=False)),
    "oft-llama": adapted(LLAMA, lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"])),
    "layernorm-tuning-llama": adapted(LLAMA, lambda: peft.LNTuningConfig(target_modules=["norm"])),
}

ADAPTERS = ("default", "other")


def two_adapters() -> Specimen:
    specimen = PEFT["lora-llama"]()
    specimen.model.add_adapter("other", lora("k_proj", "up_proj")())
    return specimen


ARCHITECTURES = ENCODERS | CAUSAL | SEQ2SEQS | VISION | SOUND | MULTIMODAL | TIMM | TORCHVISION | PEFT

COUPLED: dict[str, Builder] = {
    "clip-logits": hf("CLIPModel", CLIP, image_and_text, read=lambda output: output.logits_per_image),
    "siglip-logits": hf(
        "SiglipModel",
        {"text_config": {**CLIP_TEXT, "projection_size": 16}, "vision_config": IMAGE},
        image_and_text,
        read=lambda output: output.logits_per_text,
    ),
    "resnet-batchnorm": pictures(lambda: residual(nn.BatchNorm2d)),
    "wav2vec2-conformer": hf("Wav2Vec2ConformerForCTC", AUDIO, waveform, conv_depthwise_kernel_size=3, max_source_positions=32),
    "timm-convmixer": pictures(lambda: importlib.import_module("timm.models.convmixer").ConvMixer(8, 2, num_classes=3)),
}


def set_dropout(model: nn.Module, probability: float) -> None:
    """Give all dropout in ``model`` that can be told by its name the same probability."""
    for module in model.modules():
        for name in ("p", "dropout", "drop_prob", "attention_dropout", "attn_drop_p"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, probability)


def build(builder: Builder, dropout: float = 0.0) -> Specimen:
    """Build a model from a fixed seed, in training mode, with all parameters away from their initial values."""
    torch.manual_seed(1)
    specimen = builder()
    model = specimen.model.to(specimen.dtype).train()
    set_dropout(model, dropout)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=0.1)
    inputs = {name: x.to(specimen.dtype) if x.is_floating_point() else x for name, x in specimen.inputs.items()}
    return replace(specimen, inputs=inputs)
