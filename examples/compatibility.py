"""Which models can be trained privately: one of yours explained, or all model types of the installed transformers tried.

    python examples/compatibility.py --model package.module:factory
    python examples/compatibility.py --model package.module:factory --inputs package.module:make_inputs
    python examples/compatibility.py --transformers --jobs 2 --output compatibility.md --json compatibility.json
    python examples/compatibility.py --transformers --types bert,gpt2

Shows, for one model, what will happen to each parameter, or, for all of them, how many are right, refused or wrong. Takes seconds
for one model, three minutes for all model types (``--jobs 2``, two idle cores). Prints an explanation, or a table of verdicts per
family and a line for each type that is not right.

``factory()`` returns a model, ``make_inputs()`` a tensor, a tuple of positional inputs or a mapping of keyword inputs with at
least 2 samples; it may be left out for models of transformers. Printed is what ``dp_hooks.explain`` says.

With ``--transformers`` a tiny model with random weights is built for every model type: sizes are cut down by the names of
configuration fields, the class comes from the Auto mappings, inputs follow from the signature of ``forward``. Each type
runs in a process of its own: per-sample gradients by plain autograd on single samples (float64, or float32 where the model
cannot run in it), with dropout at 0; then one private step without noise, with SGD at learning rate 1, so that the move
of the parameters is the clipped mean. Verdicts:

- right: the parameters moved as the clipped mean of the single-sample gradients says;
- refused: the library's own error, with its reason, and no parameter moved;
- wrong: they moved otherwise, or moved although the step was refused;
- error: something else was raised that plain PyTorch does not raise;
- not built: no tiny model of this type could be constructed and run in plain PyTorch by these means. It says nothing
  about the library, and is not counted for it;
- no class: a configuration for which no Auto class builds a model, mostly a part of another model.

Models that draw random numbers although dropout is 0 are compared with the draws replaced by constants. "samples mix" is
noted where the plain gradient of the batch is not the sum of those of its samples: such a model has to be refused.
"""

import argparse
import functools
import importlib
import inspect
import itertools
import json
import math
import os
import pickle
import platform
import re
import select
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dp_hooks
from dp_hooks._no_randomness import NoRandomness
from dp_hooks.errors import DPHooksError

SAMPLES = 3
TOKENS = 16
VOCABULARY = 100
LARGEST = 5_000_000  # parameters; larger models are not run
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-2}  # some models compute in float32 inside, whatever they are given
VERDICTS = ("right", "refused", "wrong", "error", "not built", "no class")

# The families, by the first Auto mapping that knows the type; the order is also the order in which classes are tried.
FAMILIES = {
    "AutoModelForMaskedLM": "text encoders",
    "AutoModelForCausalLM": "causal language models",
    "AutoModelForSeq2SeqLM": "text to text",
    "AutoModelForImageTextToText": "image and text",
    "AutoModelForImageClassification": "vision",
    "AutoModelForVideoClassification": "vision",
    "AutoModelForSemanticSegmentation": "vision",
    "AutoModelForUniversalSegmentation": "vision",
    "AutoModelForObjectDetection": "vision",
    "AutoModelForDepthEstimation": "vision",
    "AutoModelForZeroShotImageClassification": "image and text",
    "AutoModelForZeroShotObjectDetection": "image and text",
    "AutoModelForVisualQuestionAnswering": "image and text",
    "AutoModelForSpeechSeq2Seq": "audio",
    "AutoModelForCTC": "audio",
    "AutoModelForAudioClassification": "audio",
    "AutoModelForTextToSpectrogram": "audio",
    "AutoModelForTextToWaveform": "audio",
    "AutoModelForTimeSeriesPrediction": "time series",
    "AutoModelForSequenceClassification": "text encoders",
    "AutoModelForPreTraining": "other",
    "AutoModel": "other",
}

# Sizes by the names of configuration fields; the first pattern that matches a whole name counts.
SIZES: list[tuple[str, Any]] = [
    (r"pad_token_id|pad_token_index|padding_idx", 0),
    (r"bos_token_id|decoder_start_token_id|forced_bos_token_id|cls_token_id", 1),
    (r"eos_token_id|sep_token_id|forced_eos_token_id", 2),
    (r"(?!nb_|num_).*token_(id|index)", 4),
    (r"(.*_)?vocab_size(_.*)?|vocabulary_map_size", VOCABULARY),
    (r"hidden_size_per_layer_input", 8),
    (r"num_feat_extract_layers|num_conv_layers|num_stages|num_channels|num_labels|num_feature_levels", None),
    (r"(num|n)_.*codebooks|num_quantizers", 2),
    (r"depths|layer_depths|encoder_depths|depth", 1),
    (r"first_k_dense_replace|num_nextn_predict_layers|num_kv_shared_layers|full_attention_interval", None),
    (r"(.*_)?(num|n)_?(.*_)?(layers?|blocks)|(en|de)coder_layers|layers|num_self_attends_per_block|N", 2),
    (r"num_key_value_heads|num_kv_heads|n_kv_heads|num_global_key_value_heads|.*_num_key_value_heads", 2),
    (r"(linear_num_key_heads|index_n_heads)", 2),
    (r"(.*_)?(num|n)_(.*_)?heads?|(.*_)?attention_heads|num_heads_.*", 4),
    (r"mamba_d_head|mamba_head_dim", 16),
    (r"(.*_)?head_(dim|size)|d_kv|d_head|d_key|kv_channels|qk_(no)?pe_head_dim|attention_head_size", 8),
    (r"qk_head_dim|(q|kv|o)_lora_rank|.*low_rank_dim|decay_.*rank.*", 16),
    (r"rotary_dim|time_step_rank|(.*_)?(mamba_)?d_state|ssm_state_size|state_size", 4),
    (r"(.*_)?(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|n_inner|ff_dim|feed_forward_size|mlp_dim)(_.*)?", 48),
    (r"d_inner|encoder_ffn_dim|decoder_ffn_dim|dim_feedforward", 48),
    (r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|emb_dim|embedding_size|embedding_dim)", 32),
    (r"dim|hidden_dim|(.*_)?(proj|projection)_(dim|size)|word_embed_proj_dim|lru_width|.*_hidden_dim|model_dim", 32),
    (r"num_experts_per_tok(en)?|num_experts_per_token|(moe_)?top_?k(_experts)?|moe_k|num_selected_experts", 2),
    (r"(num|n)_(local_|routed_)?experts|moe_num_experts|moe_num_routed_experts|(.*_)?num_experts", 4),
    (r"(moe_)?n(um)?_shared_experts|n_group|topk_group|(mamba_)?n_?groups", 1),
    (r"router_.*coef|.*aux_loss.*|router_jitter_noise|input_jitter_noise|.*_noise_(std|scale)", 0.0),
    (r"max_position_embeddings|n_positions|n_ctx|max_(source|target)_positions|seq_len(gth)?|max_seq_len.*|context_length", 64),
    (r"max_(en|de)coder_position_embeddings|max_context_len|max_relative_positions|block_size_max", 64),
    (r"relative_attention_(num_buckets|max_distance)|num_buckets|max_bucket_distance|position_buckets", 16),
    (r"(mamba_)?chunk_size", 8),
    (r"sliding_window|attention_window|local_attention|window_size", 4),
    (r"(.*_)?(image|crop|input)_size|input_image_size", 32),
    (r"patch_size", 8),
    (r"num_frames", 4),
    (r"num_mel_bins|feature_size|input_feat_per_channel|feature_projection_input_dim", 16),
    (r"conv_dim", (16, 16)),
    (r"conv_stride", (5, 4)),
    (r"conv_kernel", (10, 4)),
    (r"num_conv_pos_embedding(s|_groups)", 4),
    (r"num_queries|num_object_queries|num_latents|num_query_tokens", 5),
]

STAGED = {"image_size": 64, "window_size": 2}
# Fields that count layers, and switches that are turned off.
COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
OFF = ("use_cache", "apply_spec_augment", "output_router_logits", "use_timm_backbone", "use_pretrained_backbone")

Record = dict[str, Any]


# -------------------------------------------------------------------- tiny configurations


def _size_of(name: str) -> Any:
    return next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)


def _smaller(name: str, value: Any) -> Any:
    """Return a small value for the configuration field ``name``, or ``value`` itself."""
    if isinstance(value, bool):
        return value and name not in OFF
    if "drop" in name and isinstance(value, float):
        return 0.0
    if "drop" in name and isinstance(value, (list, tuple)):
        return type(value)(0.0 if isinstance(v, float) else v for v in value)
    if re.fullmatch(r"mask_(time|feature)_prob", name):
        return 0.0
    size = _size_of(name)

    def cut(number: int, most: int) -> int:
        least = min(number, most)
        return 1 << (least.bit_length() - 1) if "heads" in name and least > 0 else least

    whole = isinstance(value, int) or (value is None and name in ("pad_token_id", "num_key_value_heads"))
    if whole and isinstance(size, int):
        return size if name.endswith(("token_id", "token_index")) or value is None else cut(value, size)
    if isinstance(value, float) and isinstance(size, float):
        return size
    if isinstance(value, dict) and "mrope_section" in value:
        return {**value, "mrope_section": [2, 1, 1]}
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, int) for v in value):
        if isinstance(size, tuple):
            return type(value)(size)
        if isinstance(size, int):
            return type(value)(cut(v, size) for v in value)
        if re.fullmatch(r".*(hidden_sizes|embed_dims|channels|widths)", name):
            return type(value)(min(16, v) for v in value)
    return value


def _tiny_config(config: Any, changes: Mapping[str, Any]) -> Any:
    """Return a configuration of the same class with small sizes; fields that it does not accept are left as they are."""
    fields = config.to_dict()
    nested = {name: value for name, value in vars(config).items() if hasattr(value, "to_dict") and hasattr(value, "model_type")}
    wanted: dict[str, Any] = {name: _tiny_config(value, changes) for name, value in nested.items()}
    # A backbone in stages, whose lists have one entry per stage and whose images get smaller from stage to stage.
    staged = any(isinstance(fields.get(name), (list, tuple)) for name in ("depths", "layer_depths", "hidden_sizes"))
    for name, value in fields.items():
        if name in nested or name.startswith("_") or name in ("model_type", "transformers_version"):
            continue
        small = changes[name] if name in changes else _smaller(name, value)
        if staged and name in STAGED and isinstance(value, int):
            small = min(value, STAGED[name])
        if small != value and not (staged and name in (*COUNTS, "num_encoder_blocks", "num_blocks")):
            wanted[name] = small
    layers = next((fields[name] for name in COUNTS if isinstance(fields.get(name), int)), 0)
    if layers > 2 and not staged:
        lists = {n: v for n, v in fields.items() if isinstance(v, (list, tuple)) and len(v) == layers}
        kinds = next((v for n, v in lists.items() if all(isinstance(k, str) for k in v)), None)
        chosen = [0, 1] if kinds is None else [kinds.index(kind) for kind in dict.fromkeys(kinds)]
        chosen = sorted({0, 1} | set(chosen)) if len(chosen) < 2 else chosen
        wanted.update({n: type(v)((wanted.get(n) or v)[i] for i in chosen) for n, v in lists.items()})
        wanted.update({n: len(chosen) for n in COUNTS if isinstance(fields.get(n), int)})
    for _ in range(12):
        try:
            return type(config)(**wanted)
        except Exception as error:
            found = re.search(r"(?:argument|[Ff]ield|for) [`'](\w+)[`']", str(error))
            if found is None or wanted.pop(found.group(1), None) is None:
                raise
    raise RuntimeError("the configuration refuses too many fields")


# What else is tried where a model of the first sizes cannot be built or run.
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"head_dim": None, "num_key_value_heads": 4},
    {"head_dim": 16},
    {"image_size": 64, "patch_size": 16},
    {"intermediate_size": 32, "num_hidden_layers": 4, "layer_types": None},
)


# -------------------------------------------------------------------- inputs


def _first(config: Any, *names: str, default: Any) -> Any:
    """Return the first of these fields that the configuration or one of its parts has."""
    parts = [config, *(v for v in vars(config).values() if hasattr(v, "model_type"))]
    for name in names:
        for part in parts:
            value = getattr(part, name, None)
            if value is not None:
                return value
    return default


def _text(length: int) -> tuple[Tensor, Tensor]:
    """Return ids, and a mask that differs between samples."""
    ids = torch.randint(5, VOCABULARY - 1, (SAMPLES, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(SAMPLES, length, dtype=torch.long)
    mask[1, length - length // 4 :] = 0
    return ids, mask


def _random(*shape: int) -> Tensor:
    return torch.randn(SAMPLES, *shape, generator=torch.Generator().manual_seed(5))


def _choices(config: Any) -> dict[str, list[Tensor]]:
    """Inputs by name, in several shapes where models differ in what they take."""
    size = _first(config, "image_size", "input_size", "crop_size", default=64)
    height, width = (size[-2], size[-1]) if isinstance(size, (list, tuple)) else (size, size)
    colours = _first(config, "num_channels", "in_channels", "in_chans", default=3)
    colours = colours if isinstance(colours, int) else 3
    frames = _first(config, "num_frames", default=4)
    bins = _first(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "input_dim", default=16)
    bins = bins if isinstance(bins, int) else 16
    patch = _first(config, "patch_size", default=8)
    patch = patch if isinstance(patch, int) else 8
    source = _first(config, "max_source_positions", default=16)
    series = _first(config, "context_length", "seq_length", "prediction_length", default=16)
    channels = _first(config, "num_input_channels", "input_size", default=1)
    ids, mask = _text(TOKENS)
    images = [_random(colours, height, width), _random(colours, 64, 64), _random(frames, colours, height, width)]
    return {
        "input_ids": [ids],
        "attention_mask": [mask, torch.ones_like(mask)],  # some models have no finite gradient where all is masked
        "decoder_input_ids": [ids[:, :10]],
        "pixel_values": images,
        "pixel_values_videos": [_random(frames, colours, height, width)],
        "input_values": [_random(800), _random(source, bins), _random(4000)],
        "input_features": [_random(32, bins), _random(bins, 2 * source), _random(bins, 32)],
        "past_values": [_random(int(series), int(channels)) if isinstance(channels, int) else _random(16, 1)],
        "past_observed_mask": [torch.ones(SAMPLES, int(series), channels if isinstance(channels, int) else 1)],
        "bbox": [torch.zeros(SAMPLES, TOKENS, 4, dtype=torch.long)],
        "pixel_attention_mask": [torch.ones(SAMPLES, 16, dtype=torch.long)],
        "flattened_patches": [_random(TOKENS, patch * patch * colours + 2).abs()],
        "input_points": [torch.rand(SAMPLES, 1, 2, 2) * height],
    }


def _names(model: nn.Module, config: Any) -> Iterator[tuple[str, ...]]:
    """Sets of inputs to try, the likeliest first."""
    signature = inspect.signature(type(model).forward)
    known = [n for n, p in signature.parameters.items() if n != "self" and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needed = {n for n in known if signature.parameters[n].default is inspect.Parameter.empty}
    main = getattr(model, "main_input_name", "input_ids")
    seq2seq = bool(getattr(config, "is_encoder_decoder", False))
    base = {main} | needed | ({"decoder_input_ids"} if seq2seq else set())
    both = {"input_ids", "pixel_values"} if {"input_ids", "pixel_values"} <= set(known) else set()
    hearing = {"input_ids"} & set(known) | {"input_features", "input_values"} & set(known)
    for extra in (both, set(), hearing, {"bbox"}, {"decoder_input_ids"}, {"past_observed_mask"}):
        names = [n for n in known if n in base | extra]
        if "input_ids" in names and "attention_mask" in known:
            yield (*names, "attention_mask")
        yield tuple(names)


def _with_image_tokens(model: nn.Module, config: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put as many image tokens into the text as the vision part of the model yields for an image."""
    token = _first(config, "image_token_id", "image_token_index", default=None)
    if token is None or not {"input_ids", "pixel_values"} <= set(inputs) or not hasattr(model, "get_image_features"):
        return inputs
    with torch.no_grad():
        features = model.get_image_features(pixel_values=inputs["pixel_values"])
    for name in ("pooler_output", "last_hidden_state"):
        features = getattr(features, name, features)
    found = list(features) if isinstance(features, (list, tuple)) else [features]
    count = sum(f.shape[:-1].numel() for f in found if isinstance(f, Tensor)) // SAMPLES
    ids, mask = _text(TOKENS + count)
    ids[:, 1 : 1 + count], mask[:, : 2 + count] = token, 1
    return {**inputs, "input_ids": ids, **({"attention_mask": mask} if "attention_mask" in inputs else {})}


def _inputs(model: nn.Module, config: Any) -> Iterator[dict[str, Tensor]]:
    choices = _choices(config)
    seen = set()
    for names in _names(model, config):
        names = tuple(dict.fromkeys(names))
        if not names or names in seen or any(n not in choices for n in names):
            continue
        seen.add(names)
        for tensors in itertools.product(*(choices[n] for n in names)):
            plain = dict(zip(names, tensors, strict=True))
            try:
                yield _with_image_tokens(model, config, plain)
            except Exception:  # noqa: BLE001 - whatever the vision part raises, the text alone may do
                yield plain


# -------------------------------------------------------------------- one model


def _outputs(found: Any) -> list[Tensor]:
    values = list(found.values()) if isinstance(found, Mapping) else list(found) if isinstance(found, (tuple, list)) else [found]
    tensors = [v for v in values if isinstance(v, Tensor)]
    nested = [t for v in values if isinstance(v, (tuple, list, Mapping)) for t in _outputs(v)]
    return tensors + nested


def _has_rows(output: Tensor, samples: int) -> bool:
    return output.is_floating_point() and output.requires_grad and output.dim() > 0 and output.shape[0] == samples


def losses(
    model: nn.Module, inputs: Mapping[str, Tensor], samples: int, among: Callable[[list[Tensor]], Iterable[Tensor]] = list
) -> Tensor:
    """Return one loss per sample: all outputs with a row per sample, weighted by numbers without pattern.

    ``among`` picks outputs to look at: of those for one sample, some may have a single row for other reasons.
    """
    outputs = [t for t in among(_outputs(model(**inputs))) if _has_rows(t, samples)]
    if not outputs:
        raise ValueError("no output has a row per sample and depends on the parameters")
    total = torch.zeros(samples)
    for out in outputs:
        rows = out.clamp(-1e4, 1e4).flatten(1)
        weights = torch.sin(torch.arange(rows.shape[1]) * 12.9898 + 1).to(rows)
        total = total.to(torch.promote_types(total.dtype, rows.dtype)) + (rows * weights).sum(1) / math.sqrt(rows.shape[1])
    return total


def _one(inputs: Mapping[str, Tensor], i: int) -> dict[str, Tensor]:
    return {name: t[i : i + 1] for name, t in inputs.items()}


def _draws(model: nn.Module, inputs: Mapping[str, Tensor]) -> bool:
    """Whether a forward pass draws random numbers."""
    before = torch.get_rng_state()
    losses(model, inputs, SAMPLES)
    return not torch.equal(before, torch.get_rng_state())


def _grads(loss: Tensor, params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g
        for (name, p), g in zip(params.items(), found, strict=True)
    }


def _no_dropout(model: nn.Module) -> None:
    for module in model.modules():
        for name, value in list(vars(module).items()):
            random = re.search("drop(?!_path_rate_list)|jitter", name) or (name == "p" and "Drop" in type(module).__name__)
            if random and isinstance(value, float):
                setattr(module, name, 0.0)


def _prepared(model: nn.Module) -> nn.Module:
    """Return the model in training mode without dropout, and without weights that are zero to begin with."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(torch.randn(p.shape, generator=generator).to(p) * 0.05)
    _no_dropout(model)
    return model.train()


class NoClassError(ValueError):
    """No Auto class builds a model from a configuration."""


def _models(kind: str, problems: list[Exception]) -> Iterator[tuple[str, Callable[[], nn.Module], Any]]:
    """Tiny models of one type: class, a function that builds it, configuration; notes what could not be configured."""
    import transformers
    from transformers import AutoConfig

    default = AutoConfig.for_model(kind)
    autos = [auto for name in FAMILIES if (auto := getattr(transformers, name, None)) is not None]
    autos = [auto for auto in autos if type(default) in auto._model_mapping]
    for changes in VARIANTS if autos else ():
        try:
            config = _tiny_config(default, changes)
        except Exception as error:  # noqa: BLE001 - other sizes may do
            problems.append(error)
            continue
        for auto in autos:
            yield auto.__name__, functools.partial(auto.from_config, config), config
            eager = functools.partial(auto.from_config, config, attn_implementation="eager")
            yield auto.__name__, eager, config


def _works(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Run the model as often as it takes to know that plain PyTorch can train it: on the batch and on one sample."""
    for some, samples in ((inputs, SAMPLES), (_one(inputs, 0), 1)):
        losses(model, some, samples).sum().backward()
    finite = all(bool(torch.isfinite(p.grad.to_dense()).all()) for p in model.parameters() if p.grad is not None)
    model.zero_grad(set_to_none=True)
    if not finite:
        raise ValueError("the gradient is not finite in plain PyTorch")


def build(kind: str, deadline: float) -> tuple[Record, nn.Module, dict[str, Tensor]]:
    """Return what is known, a tiny model of this type and inputs that it runs on; raises what went wrong first."""
    problems: list[Exception] = []
    for name, make, config in _models(kind, problems):
        if time.monotonic() > deadline:
            break
        try:
            with torch.device("meta"):
                count = sum(p.numel() for p in make().parameters())
        except Exception:  # noqa: BLE001 - not every model can be built without memory
            count = 0
        try:
            if count > LARGEST:
                raise ValueError(f"{name} is too large: {count:,} parameters")
            torch.manual_seed(0)
            model = _prepared(make())
            for inputs in _inputs(model, config):
                for dtype in (torch.float64, torch.float32):
                    try:
                        model.to(dtype)
                        cast = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}
                        _works(model, cast)
                        known = {"class": type(model).__name__, "dtype": str(dtype).removeprefix("torch.")}
                        return {**known, "inputs": ", ".join(cast)}, model, cast
                    except Exception as error:  # noqa: BLE001 - other inputs may do
                        problems.append(error)
        except Exception as error:  # noqa: BLE001 - another class may do
            problems.append(error)
    raise problems[0] if problems else NoClassError("no Auto class builds a model from this configuration")


def _family(kind: str) -> str:
    """The family of a type, also if no model of it can be built."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[kind]
    except Exception:  # noqa: BLE001 - a type whose package is not installed
        return "other"
    autos = ((getattr(transformers, name, None), family) for name, family in FAMILIES.items())
    return next((family for auto, family in autos if auto is not None and config in auto._model_mapping), "other")


def _relative(have: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest disagreement of a parameter, and its name."""
    whole = math.sqrt(sum(float(t.double().square().sum()) for t in want.values()))
    worst = (0.0, "")
    for name, value in want.items():
        off = float((have[name].double() - value.double()).norm())
        size = max(float(value.double().norm()), 1e-2 * whole, 1e-30)
        worst = max(worst, (off / size if math.isfinite(off) else math.inf, name))
    return worst


def judge(model: nn.Module, inputs: dict[str, Tensor]) -> Record:
    """Compare one private step without noise with plain autograd on single samples."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    steady = NoRandomness if _draws(model, inputs) else nullcontext
    with steady():
        rows = [_has_rows(t, SAMPLES) for t in _outputs(model(**inputs))]
        among = functools.partial(itertools.compress, selectors=rows)
        alone = [_grads(losses(model, _one(inputs, i), 1, among).sum(), params) for i in range(SAMPLES)]
        batch = _grads(losses(model, inputs, SAMPLES).sum(), params)
    norms = torch.stack([torch.stack([g.double().norm() for g in one.values()]).norm() for one in alone])
    if not bool(torch.isfinite(norms).all()) or float(norms.max()) == 0:
        raise ValueError("the gradient of a single sample is not finite, or zero, in plain PyTorch")
    tolerance = TOLERANCE[next(iter(params.values())).dtype]
    mixed = _relative(batch, {name: torch.stack([one[name] for one in alone]).sum(0) for name in params})[0] > tolerance
    with torch.no_grad():
        for name, value in model.named_buffers():
            if name in buffers and buffers[name].shape == value.shape:
                value.copy_(buffers[name])
    bound = float(norms.median())
    factors = (bound / norms).clamp(max=1)
    want = {name: torch.stack([f * one[name].double() for f, one in zip(factors, alone, strict=True)]).sum(0) for name in params}
    before = {name: p.detach().clone() for name, p in params.items()}
    record: Record = {"mixes": mixed, "parameters": sum(p.numel() for p in params.values())}
    record["draws"] = steady is NoRandomness
    start = time.monotonic()
    try:
        with steady():
            private_step(model, inputs, bound)
        record["verdict"] = "right"
    except DPHooksError as error:
        record |= {"verdict": "refused", "reason": f"{type(error).__name__}: {_short(str(error))}"}
    except Exception as error:  # noqa: BLE001 - that is what is being found out
        record |= {"verdict": "error", "reason": _described(error)}
    record["step_seconds"] = round(time.monotonic() - start, 2)
    moved = {name: (before[name] - p.detach()).double() * SAMPLES for name, p in params.items()}
    if record["verdict"] == "right":
        off, name = _relative(moved, want)
        record["off"] = off
        if not off <= tolerance:
            record |= {"verdict": "wrong", "reason": f"{name} moved otherwise than it should by {off:.1e} of its size"}
    elif any(bool(t.any()) for t in moved.values()):
        record |= {"verdict": "wrong", "reason": "parameters moved although: " + record["reason"]}
    return record


def private_step(model: nn.Module, inputs: dict[str, Tensor], bound: float) -> None:
    """Take one private step without noise, with SGD at learning rate 1."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    loader = DataLoader(TensorDataset(torch.zeros(SAMPLES, 1)), batch_size=SAMPLES)
    scope = dp_hooks.private_training(
        model, optimizer, loader, noise_multiplier=0.0, max_grad_norm=bound, poisson_sampling=False, accountant="rdp"
    )
    with scope as (private, batches):
        for _ in batches:
            private.zero_grad()
            losses(model, inputs, SAMPLES).mean().backward()
            private.step()


def _short(text: str, length: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 3] + "..."


def _described(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" ({Path(last[0].filename).name}:{last[0].lineno})" if last else ""
    return _short(f"{type(error).__name__}: {error}") + where


def try_type(kind: str, seconds: float) -> Record:
    """Build one type and judge it."""
    record: Record = {"type": kind, "family": _family(kind)}
    try:
        known, model, inputs = build(kind, time.monotonic() + 0.7 * seconds)
        record |= known | judge(model, inputs)
    except NoClassError as error:
        record |= {"verdict": "no class", "reason": str(error)}
    except Exception as error:  # noqa: BLE001 - plain PyTorch only so far: judge() catches what the library raises
        record |= {"verdict": "not built", "reason": _described(error)}
    return record


# -------------------------------------------------------------------- all types


@dataclass
class _Child:
    kind: str
    pid: int
    pipe: int
    start: float
    received: bytes = b""


def _fork(kind: str, seconds: float) -> _Child:
    out, into = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(out)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            data = pickle.dumps(try_type(kind, seconds))
            with os.fdopen(into, "wb") as pipe:
                pipe.write(data)
            code = 0
        finally:
            os._exit(code)
    os.close(into)
    return _Child(kind, pid, out, time.monotonic())


def _end(child: _Child, seconds: float, late: bool) -> Record:
    os.close(child.pipe)
    if late:
        os.kill(child.pid, signal.SIGKILL)
    _, status = os.waitpid(child.pid, 0)
    if child.received and not late:
        record: Record = pickle.loads(child.received)
    else:
        reason = f"not finished after {seconds:.0f} s" if late else f"the process died with status {status}"
        record = {"type": child.kind, "family": _family(child.kind), "verdict": "not built", "reason": reason}
    return record | {"seconds": round(time.monotonic() - child.start, 1)}


def run_all(kinds: list[str], *, jobs: int = 2, seconds: float = 60, say: Callable[[str], None] = print) -> list[Record]:
    """Try all ``kinds``, each in a process of its own, ``jobs`` at a time."""
    waiting, done = list(kinds), []
    running: list[_Child] = []
    counts: Counter[str] = Counter()
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(_fork(waiting.pop(0), seconds))
        ready, _, _ = select.select([child.pipe for child in running], [], [], 1.0)
        for child in list(running):
            data = os.read(child.pipe, 1 << 20) if child.pipe in ready else None
            child.received += data or b""
            late = time.monotonic() - child.start > seconds
            if data == b"" or late:
                running.remove(child)
                record = _end(child, seconds, late and data != b"")
                done.append(record)
                counts[record["verdict"]] += 1
                reason = f"  {record.get('reason', '')}"[:110]
                tally = " ".join(f"{counts[v]} {v}," for v in VERDICTS if counts[v]).rstrip(",")
                say(f"[{len(done)}/{len(kinds)}: {tally}] {record['type']} {record['verdict']} {record['seconds']} s{reason}")
    return sorted(done, key=lambda record: record["type"])


def markdown(records: list[Record]) -> str:
    """Lay the results out as a table by family and as lists of what is not right."""
    import transformers

    lines = [
        "# Model types of transformers under dp_hooks",
        "",
        f"dp_hooks {dp_hooks.__version__}, transformers {transformers.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}. Tiny models with random weights, {SAMPLES} samples, one private step without noise, "
        "compared with plain autograd on single samples. What could not be built says nothing about the library.",
        "",
        "| family | types | " + " | ".join(VERDICTS) + " |",
        "|---|" + "---|" * (len(VERDICTS) + 1),
    ]
    families = list(dict.fromkeys(FAMILIES.values()))
    for family in [*families, "all"]:
        rows = [r for r in records if family in ("all", r["family"])]
        if rows:
            counts = Counter(r["verdict"] for r in rows)
            lines.append(f"| {family} | {len(rows)} | " + " | ".join(str(counts[v]) for v in VERDICTS) + " |")
    for verdict in VERDICTS[1:]:
        rows = [r for r in records if r["verdict"] == verdict]
        if rows:
            lines += ["", f"## {verdict[0].upper()}{verdict[1:]} ({len(rows)})", ""]
            for r in rows:
                mixes = " (samples mix)" if r.get("mixes") else ""
                what = f" {r['class']}" if "class" in r else ""
                lines.append(f"- `{r['type']}`{what}{mixes}: {_short(r.get('reason', ''), 400)}")
    right = [r["type"] for r in records if r["verdict"] == "right"]
    if right:
        lines += ["", f"## Right ({len(right)})", "", ", ".join(f"`{name}`" for name in right)]
    return "\n".join(lines) + "\n"


def all_types() -> list[str]:
    """The model types of the installed transformers."""
    from transformers.models.auto import configuration_auto

    return sorted(configuration_auto.CONFIG_MAPPING_NAMES)


# -------------------------------------------------------------------- command line


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    if not name:
        raise SystemExit(f"{path!r}: write package.module:name")
    sys.path.insert(0, os.getcwd())
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _explain(model: str, inputs: str | None) -> None:
    built = _load(model)()
    if inputs is not None:
        print(dp_hooks.explain(built, _load(inputs)()))
        return
    if not hasattr(built, "config"):
        raise SystemExit("give --inputs package.module:make_inputs: what this model takes cannot be told from its configuration")
    error: Exception | None = None
    for found in _inputs(built, built.config):
        try:
            with torch.no_grad():
                built(**found)
        except Exception as failed:  # noqa: BLE001 - other inputs may do
            error = error or failed
            continue
        print(dp_hooks.explain(built, found))
        return
    raise SystemExit(f"no inputs were found that the model runs on; give --inputs. The first attempt: {error}")


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="MODULE:FACTORY", help="explain the model that this function returns")
    what.add_argument("--transformers", action="store_true", help="try the model types of the installed transformers")
    parser.add_argument("--inputs", metavar="MODULE:FUNCTION", help="makes inputs for --model")
    parser.add_argument("--types", help="model types, separated by commas; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (2)")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for one type (60)")
    parser.add_argument("--output", type=Path, help="write the table here, as Markdown")
    parser.add_argument("--json", type=Path, help="write all results here")
    args = parser.parse_args(argv)
    if args.model:
        _explain(args.model, args.inputs)
        return
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    import transformers

    for name in ("torch._dynamo", "torchvision", "transformers.models.bert.modeling_bert"):
        importlib.import_module(name)  # once, before the processes are forked
    transformers.logging.set_verbosity_error()
    known = all_types()
    kinds = args.types.split(",") if args.types else known
    if unknown := sorted(set(kinds) - set(known)):
        parser.error(f"unknown model types: {', '.join(unknown)}")
    start = time.monotonic()
    records = run_all(kinds, jobs=args.jobs, seconds=args.timeout)
    text = markdown(records)
    if args.output:
        args.output.write_text(text)
    if args.json:
        args.json.write_text(json.dumps(records, indent=1))
    print(f"\n{text}\n{len(records)} types in {time.monotonic() - start:.0f} s")
    if any(record["verdict"] == "wrong" for record in records):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
