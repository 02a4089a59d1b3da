"""Every architecture of keras_hub in a tiny size: its constructor's arguments.

Most architectures take the sizes of `SIZES` by the names of their arguments. The others have a
table of their own, in which a `Part` stands for an encoder or decoder that keras_hub makes too.
Nothing is downloaded.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import keras

LENGTH = 16
"""Tokens of a sample."""
IMAGE = (64, 64, 3)
SIZES: dict[str, Any] = {
    "vocabulary_size": 50,
    "vocab_size": 50,
    "num_layers": 2,
    "num_heads": 4,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "num_attention_heads": 4,
    "hidden_dim": 32,
    "hidden_size": 32,
    "embedding_dim": 32,
    "intermediate_dim": 64,
    "intermediate_size": 64,
    "mlp_dim": 64,
    "expert_intermediate_dim": 16,
    "moe_intermediate_dim": 16,
    "shared_expert_intermediate_dim": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "top_k": 2,
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "head_size": 8,
    "max_sequence_length": LENGTH,
    "bucket_size": 8,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "image_shape": IMAGE,
    "patch_size": 8,
    "image_size": 16,
    "projection_dim": 32,
}
"""Sizes by the names of arguments."""


@dataclass(frozen=True)
class Part:
    """A model or layer of keras_hub that another one takes."""

    path: str
    """Module inside keras_hub.src.models, and the class behind a colon."""
    options: dict[str, Any]

    def make(self) -> Any:
        """The model or layer."""
        module, _, name = self.path.partition(":")
        part_type = getattr(importlib.import_module(f"keras_hub.src.models.{module}"), name)
        return part_type(**resolved(self.options))


def resolved(options: dict[str, Any]) -> dict[str, Any]:
    """The options with every part made."""
    return {
        name: value.make() if isinstance(value, Part) else value for name, value in options.items()
    }


RESNET_SIZES = {
    "input_conv_filters": [64],
    "input_conv_kernel_sizes": [7],
    "stackwise_num_filters": [64, 16, 16, 32],
    "stackwise_num_blocks": [1, 1, 1, 1],
    "stackwise_num_strides": [1, 2, 2, 2],
    "block_type": "basic_block",
    "image_shape": IMAGE,
}
OPEN_RESNET = {**RESNET_SIZES, "image_shape": (None, None, 3)}
RESNET = Part("resnet.resnet_backbone:ResNetBackbone", RESNET_SIZES)
MIX_SIZES = {
    "layerwise_depths": [1, 1],
    "hidden_dims": [8, 16],
    "num_layers": 2,
    "layerwise_num_heads": [1, 2],
    "layerwise_sr_ratios": [8, 4],
    "max_drop_path_rate": 0.1,
    "layerwise_patch_sizes": [7, 3],
    "layerwise_strides": [4, 2],
    "image_shape": IMAGE,
}
HGNET_SIZES = {
    "stem_channels": [3, 8, 8],
    "stackwise_stage_filters": [[8, 8, 16, 1, 1, 3], [16, 8, 32, 1, 1, 3]],
    "apply_downsample": [False, True],
    "use_lightweight_conv_block": [False, False],
    "depths": [1, 1],
    "hidden_sizes": [16, 32],
    "embedding_size": 8,
    "use_learnable_affine_block": True,
    "hidden_act": "relu",
    "image_shape": IMAGE,
    "out_features": ["stage1", "stage2"],
}
TWO_TOWERS = {"hidden_dim": 32, "num_layers": 2, "num_heads": 2, "intermediate_dim": 64}
TEXT_TOWER = {"vocabulary_size": 50, "embedding_dim": 32, "max_sequence_length": LENGTH}
VISION_TOWER = {"patch_size": 16, "image_shape": IMAGE}
SHARED_GEMMA = {
    "image_size": 16,
    "patch_size": 4,
    "pool_size": 2,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 32,
    "output_dim": 32,
}
VAE = Part(
    "vae.vae_backbone:VAEBackbone",
    {
        "encoder_num_filters": [32, 32, 32, 32],
        "encoder_num_blocks": [1, 1, 1, 1],
        "decoder_num_filters": [32, 32, 32, 32],
        "decoder_num_blocks": [1, 1, 1, 1],
        "sampler_method": "mode",
        "name": "vae",
    },
)


def clip_text(name: str, width: int) -> Part:
    """A text encoder of CLIP."""
    sizes = {**TWO_TOWERS, **TEXT_TOWER, "embedding_dim": width, "hidden_dim": width}
    options = {**sizes, "intermediate_output_index": -2, "name": name}
    return Part("clip.clip_text_encoder:CLIPTextEncoder", options)


def encoder_and_decoder(layer_types: list[str]) -> dict[str, Any]:
    """Sizes of an encoder and a decoder of T5Gemma."""
    sizes = {
        "hidden_dim": 32,
        "intermediate_dim": 64,
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_types": layer_types,
    }
    options: dict[str, Any] = {"vocabulary_size": 50, "sliding_window": 8, "attention_dropout": 0.1}
    for side in ("encoder", "decoder"):
        options |= {f"{side}_{name}": value for name, value in sizes.items()}
    return {**options, "cross_attention_hidden_size": 32, "attn_logit_softcapping": 50.0}


def per_block(values: dict[str, Any]) -> dict[str, Any]:
    """Two stages of MobileNetV5, of one and of two blocks that are alike."""
    return {f"stackwise_{name}": [[value], [value, value]] for name, value in values.items()}


DETR = {"num_layers": 2, "hidden_dim": 16, "intermediate_dim": 32, "num_heads": 2}
SMALL_LANGUAGE_MODEL = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rope_layer_enabled_list": [True, True],
    "layer_types": ["attention", "attention"],
    "mlp_bias": False,
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 32,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
}
LINEAR_ATTENTION = {
    "num_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "BASNetBackbone": {"image_encoder": replace(RESNET, options=OPEN_RESNET), "num_classes": 1},
    "BLIP2Backbone": {
        "vision_encoder": Part(
            "blip2.blip2_vision_encoder:BLIP2VisionEncoder",
            {
                "image_size": 32,
                "patch_size": 4,
                "num_layers": 2,
                "num_heads": 2,
                "hidden_dim": 16,
                "intermediate_dim": 32,
                "use_patch_bias": True,
                "use_class_token": True,
                "use_mha_bias": True,
                "use_mlp_bias": True,
                "dropout_rate": 0.0,
                "layer_norm_epsilon": 1e-6,
                "initializer_range": 0.02,
            },
        ),
        "qformer": Part(
            "blip2.blip2_qformer:BLIP2QFormer",
            {
                "num_query_tokens": 2,
                "num_layers": 2,
                "num_heads": 2,
                "hidden_dim": 8,
                "intermediate_dim": 16,
                "vision_dim": 16,
                "cross_attention_frequency": 1,
                "dropout": 0.0,
                "layer_norm_epsilon": 1e-6,
            },
        ),
        "language_model": Part(
            "blip2.blip2_custom_opt:BLIP2CustomOPT",
            {
                "vocabulary_size": 50,
                "num_layers": 2,
                "num_heads": 2,
                "hidden_dim": 8,
                "intermediate_dim": 16,
                "num_query_tokens": 2,
                "qformer_hidden_dim": 8,
                "max_sequence_length": 2 * LENGTH,
                "dropout": 0.0,
                "language_projection": None,
            },
        ),
    },
    "CLIPBackbone": {
        "vision_encoder": Part(
            "clip.clip_vision_encoder:CLIPVisionEncoder",
            {**TWO_TOWERS, **VISION_TOWER, "name": "vision_encoder"},
        ),
        "text_encoder": Part(
            "clip.clip_text_encoder:CLIPTextEncoder",
            {**TWO_TOWERS, **TEXT_TOWER, "name": "text_encoder"},
        ),
    },
    "MetaCLIP2Backbone": {
        "vision_encoder": Part(
            "metaclip_2.metaclip_2_vision_encoder:MetaCLIP2VisionEncoder",
            {**TWO_TOWERS, **VISION_TOWER, "name": "vision_encoder"},
        ),
        "text_encoder": Part(
            "metaclip_2.metaclip_2_text_encoder:MetaCLIP2TextEncoder",
            {**TWO_TOWERS, **TEXT_TOWER, "name": "text_encoder"},
        ),
    },
    "SigLIPBackbone": {
        "vision_encoder": Part(
            "siglip.siglip_vision_encoder:SigLIPVisionEncoder",
            {**TWO_TOWERS, **VISION_TOWER, "name": "vision_encoder"},
        ),
        "text_encoder": Part(
            "siglip.siglip_text_encoder:SigLIPTextEncoder",
            {**TWO_TOWERS, **TEXT_TOWER, "name": "text_encoder"},
        ),
    },
    "CSPNetBackbone": {
        "stem_filters": 8,
        "stem_kernel_size": 3,
        "stem_strides": 1,
        "stackwise_strides": 2,
        "stackwise_depth": [1, 2],
        "stackwise_num_filters": [16, 32],
        "block_type": "dark_block",
        "stage_type": "csp",
        "stem_padding": "same",
        "down_growth": True,
        "bottle_ratio": (0.5, 1.0),
        "block_ratio": (1.0, 0.5),
        "expand_ratio": (2.0, 1.0),
    },
    "DFineBackbone": {
        "backbone": Part("hgnetv2.hgnetv2_backbone:HGNetV2Backbone", HGNET_SIZES),
        "decoder_in_channels": [16, 16],
        "encoder_hidden_dim": 16,
        "num_labels": 4,
        "num_denoising": 10,
        "learn_initial_query": False,
        "num_queries": 10,
        "anchor_image_size": IMAGE[:2],
        "feat_strides": [4, 8],
        "num_feature_levels": 2,
        "hidden_dim": 16,
        "encoder_in_channels": [16, 32],
        "encode_proj_layers": [1],
        "num_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "num_encoder_layers": 1,
        "hidden_expansion": 0.5,
        "depth_multiplier": 0.5,
        "eval_idx": -1,
        "num_decoder_layers": 2,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 32,
        "decoder_n_points": [2, 2],
        "lqe_hidden_dim": 16,
        "num_lqe_layers": 2,
        "out_features": ["stage1", "stage2"],
        "image_shape": IMAGE,
        "seed": 0,
    },
    "DINOV2Backbone": {"position_embedding_shape": IMAGE},
    "DeepLabV3Backbone": {
        "image_encoder": RESNET,
        "low_level_feature_key": "P2",
        "spatial_pyramid_pooling_key": "P4",
        "dilation_rates": [6, 12, 18],
        "upsampling_size": 4,
    },
    "DenseNetBackbone": {"stackwise_num_repeats": [1, 2, 1], "growth_rate": 4},
    "DepthAnythingBackbone": {
        "image_encoder": Part(
            "dinov2.dinov2_backbone:DINOV2Backbone",
            {
                "patch_size": 14,
                "num_layers": 4,
                "hidden_dim": 16,
                "num_heads": 2,
                "intermediate_dim": 32,
                "image_shape": (126, 126, 3),
                "position_embedding_shape": (126, 126, 3),
                "apply_layernorm": True,
                "name": "image_encoder",
            },
        ),
        "reassemble_factors": [4, 2, 1, 0.5],
        "neck_hidden_dims": [8, 16, 16, 32],
        "fusion_hidden_dim": 16,
        "head_hidden_dim": 8,
        "head_in_index": -1,
        "feature_keys": ["stage1", "stage2", "stage3", "stage4"],
    },
    "EdRecBackbone": {"num_layers_enc": 2, "num_layers_dec": 2},
    "EfficientNetBackbone": {
        "stackwise_kernel_sizes": [3, 5],
        "stackwise_num_repeats": [1, 2],
        "stackwise_input_filters": [16, 16],
        "stackwise_output_filters": [16, 32],
        "stackwise_expansion_ratios": [1, 4],
        "stackwise_squeeze_and_excite_ratios": [0.0, 0.25],
        "stackwise_strides": [1, 2],
        "stackwise_block_types": ["fused", "unfused"],
        "stackwise_force_input_filters": [0, 0],
        "stackwise_nores_option": [False, False],
        "stackwise_width_coefficients": [1.0, 1.0],
        "stackwise_depth_coefficients": [1.0, 1.0],
        "input_shape": IMAGE,
    },
    "FluxBackbone": {
        "input_channels": 64,
        "hidden_size": 256,
        "mlp_ratio": 2.0,
        "num_heads": 4,
        "depth": 1,
        "depth_single_blocks": 1,
        "axes_dim": [8, 28, 28],
        "theta": 10_000,
        "use_bias": True,
        "guidance_embed": True,
        "image_shape": (LENGTH, 64),
        "text_shape": (LENGTH, 64),
        "image_ids_shape": (LENGTH, 3),
        "text_ids_shape": (LENGTH, 3),
        "y_shape": (64,),
    },
    "Gemma3Backbone": {
        "vision_encoder": Part(
            "gemma3.gemma3_vision_encoder:Gemma3VisionEncoder",
            SHARED_GEMMA,
        ),
        "use_sliding_window_attention": True,
    },
    "Gemma3nBackbone": {
        "text_vocab_size": 50,
        "text_hidden_size": 32,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "intermediate_size": [64, 64],
        "hidden_activation": "gelu_approximate",
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_theta": 10000.0,
        "max_position_embeddings": LENGTH,
        "vocab_size_per_layer_input": 50,
        "hidden_size_per_layer_input": 8,
        "altup_num_inputs": 2,
        "laurel_rank": 2,
    },
    "Gemma4Backbone": {
        "vision_encoder": Part(
            "gemma4.gemma4_vision_encoder:Gemma4VisionEncoder",
            {**SHARED_GEMMA, "head_dim": 8, "num_key_value_heads": 2},
        ),
    },
    "HGNetV2Backbone": HGNET_SIZES,
    "MiTBackbone": MIX_SIZES,
    "MobileNetBackbone": {
        "stackwise_expansion": [[16, 24], [32, 48]],
        "stackwise_num_blocks": [2, 2],
        "stackwise_num_filters": [[8, 8], [16, 16]],
        "stackwise_kernel_size": [[3, 3], [5, 5]],
        "stackwise_num_strides": [[2, 1], [2, 1]],
        "stackwise_se_ratio": [[None, None], [0.25, 0.25]],
        "stackwise_activation": [["relu", "relu"], ["hard_swish", "hard_swish"]],
        "stackwise_padding": [[1, 1], [2, 2]],
        "output_num_filters": 64,
        "depthwise_filters": 8,
        "depthwise_stride": 2,
        "depthwise_residual": False,
        "squeeze_and_excite": 0.5,
        "last_layer_filter": 48,
    },
    "MobileNetV5Backbone": {
        "stackwise_num_blocks": [1, 2],
        "stackwise_block_types": [["er"], ["uir", "uir"]],
        "stackwise_num_filters": [[8], [16, 16]],
        "stackwise_strides": [[2], [2, 1]],
        **per_block(
            {
                "act_layers": "relu",
                "exp_ratios": 4.0,
                "se_ratios": 0.0,
                "dw_kernel_sizes": 5,
                "dw_start_kernel_sizes": 0,
                "dw_end_kernel_sizes": 0,
                "exp_kernel_sizes": 3,
                "pw_kernel_sizes": 1,
                "num_heads": 0,
                "key_dims": 0,
                "value_dims": 0,
                "kv_strides": 0,
                "use_cpe": False,
            }
        ),
        "use_msfa": False,
    },
    "MoonshineBackbone": {
        "filter_dim": 32,
        "encoder_num_layers": 2,
        "decoder_num_layers": 2,
        "encoder_num_heads": 4,
        "decoder_num_heads": 4,
    },
    "PARSeqBackbone": {
        "image_encoder": Part(
            "vit.vit_backbone:ViTBackbone",
            {
                "image_shape": (32, 64, 3),
                "patch_size": (4, 8),
                "num_layers": 2,
                "num_heads": 2,
                "hidden_dim": 32,
                "mlp_dim": 64,
                "use_class_token": False,
                "name": "image_encoder",
            },
        ),
        "max_label_length": LENGTH,
        "decoder_hidden_dim": 32,
        "num_decoder_layers": 1,
        "num_decoder_heads": 2,
        "decoder_mlp_dim": 64,
    },
    "PaliGemmaBackbone": {
        "vit_patch_size": 4,
        "vit_num_layers": 2,
        "vit_num_heads": 2,
        "vit_hidden_dim": 16,
        "vit_intermediate_dim": 32,
    },
    "Qwen3_5Backbone": LINEAR_ATTENTION,
    "Qwen3_5MoeBackbone": LINEAR_ATTENTION,
    "RWKV7Backbone": {"gate_lora": 16, "mv_lora": 8, "aaa_lora": 8, "decay_lora": 8},
    "ResNetBackbone": RESNET_SIZES,
    "RetinaNetBackbone": {
        "image_encoder": RESNET,
        "min_level": 3,
        "max_level": 6,
        "use_p5": True,
    },
    "SAM3PromptableConceptBackbone": {
        "vision_encoder": Part(
            "sam3.sam3_vision_encoder:SAM3VisionEncoder",
            {
                **DETR,
                "image_shape": (28, 28, 3),
                "patch_size": 14,
                "fpn_hidden_dim": 16,
                "fpn_scale_factors": [4.0, 2.0, 1.0, 0.5],
                "pretrain_image_shape": (42, 42, 3),
                "window_size": 2,
                "global_attn_indexes": [1],
            },
        ),
        "text_encoder": Part(
            "sam3.sam3_text_encoder:SAM3TextEncoder",
            {**DETR, "vocabulary_size": 50, "embedding_dim": 16},
        ),
        "geometry_encoder": Part(
            "sam3.sam3_geometry_encoder:SAM3GeometryEncoder", {**DETR, "roi_size": 7}
        ),
        "detr_encoder": Part("sam3.sam3_detr_encoder:SAM3DetrEncoder", DETR),
        "detr_decoder": Part(
            "sam3.sam3_detr_decoder:SAM3DetrDecoder",
            {**DETR, "image_shape": (28, 28, 3), "patch_size": 14, "num_queries": 8},
        ),
        "mask_decoder": Part(
            "sam3.sam3_mask_decoder:SAM3MaskDecoder",
            {"num_upsampling_stages": 3, "hidden_dim": 16, "num_heads": 2},
        ),
    },
    "SAMBackbone": {
        "image_encoder": Part(
            "vit_det.vit_det_backbone:ViTDetBackbone",
            {
                "hidden_size": 16,
                "num_layers": 2,
                "intermediate_dim": 32,
                "num_heads": 2,
                "global_attention_layer_indices": [1],
                "patch_size": 16,
                "num_output_channels": 8,
                "window_size": 2,
                "image_shape": (16, 16, 3),
            },
        ),
        "prompt_encoder": Part(
            "sam.sam_prompt_encoder:SAMPromptEncoder",
            {
                "hidden_size": 8,
                "image_embedding_size": (8, 8),
                "input_image_size": (16, 16),
                "mask_in_channels": 16,
            },
        ),
        "mask_decoder": Part(
            "sam.sam_mask_decoder:SAMMaskDecoder",
            {
                "num_layers": 2,
                "hidden_size": 16,
                "intermediate_dim": 32,
                "num_heads": 2,
                "embedding_dim": 8,
                "num_multimask_outputs": 3,
                "iou_head_depth": 3,
                "iou_head_hidden_dim": 8,
            },
        ),
    },
    "SegFormerBackbone": {
        "image_encoder": Part("mit.mit_backbone:MiTBackbone", MIX_SIZES),
        "projection_filters": 32,
    },
    "SmolLM3Backbone": SMALL_LANGUAGE_MODEL,
    "SmolLMBackbone": SMALL_LANGUAGE_MODEL,
    "StableDiffusion3Backbone": {
        "mmdit_patch_size": 2,
        "mmdit_hidden_dim": 32,
        "mmdit_num_layers": 2,
        "mmdit_num_heads": 2,
        "mmdit_position_size": 192,
        "mmdit_qk_norm": None,
        "mmdit_dual_attention_indices": None,
        "vae": VAE,
        "clip_l": clip_text("clip_l", 32),
        "clip_g": clip_text("clip_g", 64),
    },
    "SwinTransformerBackbone": {
        "embed_dim": 16,
        "depths": (2, 2),
        "num_heads": (2, 4),
        "window_size": 4,
    },
    "T5Gemma2Backbone": encoder_and_decoder(["sliding_attention", "full_attention"]),
    "T5GemmaBackbone": encoder_and_decoder(["sliding_attention", "full_attention"]),
    "VGGBackbone": {"stackwise_num_repeats": [1, 2], "stackwise_num_filters": [8, 16]},
    "ViTBackbone": {"patch_size": (8, 8)},
    "ViTDetBackbone": {
        "global_attention_layer_indices": [1],
        "num_output_channels": 8,
        "window_size": 4,
    },
    "VideoPrismBackbone": {
        "num_frames": 4,
        "num_spatial_layers": 1,
        "num_temporal_layers": 1,
        "num_auxiliary_layers": 1,
    },
    "XceptionBackbone": {
        "stackwise_conv_filters": [[8, 16], [32, 32], [64, 64]],
        "stackwise_pooling": [False, True, False],
    },
}
"""Arguments of an architecture beside those of `SIZES`."""
INPUTS: dict[str, dict[str, tuple[int, ...]]] = {
    "Gemma3Backbone": {
        "token_ids": (LENGTH,),
        "padding_mask": (LENGTH,),
        "images": (1, 16, 16, 3),
        "vision_indices": (4,),
        "vision_mask": (LENGTH,),
    },
    "Gemma4Backbone": {
        "token_ids": (LENGTH,),
        "padding_mask": (LENGTH,),
        "position_ids": (LENGTH,),
        "pixel_values": (1, 16, 48),
        "pixel_position_ids": (1, 16, 2),
        "vision_indices": (4,),
        "vision_mask": (LENGTH,),
    },
    "MoonshineBackbone": {
        "encoder_input_values": (2048, 1),
        "encoder_padding_mask": (2048,),
        "decoder_token_ids": (LENGTH,),
        "decoder_padding_mask": (LENGTH,),
    },
}
"""Shapes of samples of architectures whose inputs differ in length."""
TRAINED_PARTS = {"StableDiffusion3Backbone": "diffuser"}
"""The part of a pipeline that is trained; the rest of this one is not differentiable."""
BASES = ("Backbone", "FeaturePyramidBackbone")
"""Classes that others derive from, without an architecture of their own."""


def backbones() -> Iterator[tuple[str, Any]]:
    """Name and class of every architecture."""
    models: Any = importlib.import_module("keras_hub").models
    for name, backbone in sorted(vars(models).items()):
        if inspect.isclass(backbone) and name.endswith("Backbone") and name not in BASES:
            yield name, backbone


def tiny_backbone(name: str, backbone: Any) -> tuple[Any, Any]:
    """Inputs and outputs of an architecture in a tiny size."""
    parameters = inspect.signature(backbone.__init__).parameters
    sizes = {key: SIZES[key] for key in parameters if key in SIZES}
    model = backbone(**{**sizes, **resolved(OPTIONS.get(name, {}))})
    if name in TRAINED_PARTS:
        model = getattr(model, TRAINED_PARTS[name])
    if name not in INPUTS:
        return model.input, model.output
    inputs = {
        key: keras.Input(shape, dtype=model.input[key].dtype, name=key)
        for key, shape in INPUTS[name].items()
    }
    return inputs, model(inputs)
