"""Models of transformers, each with a tiny random configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.other_models.entry import FULL, SLIM, Entry, noise, tokens

WORDS = 40  # of all vocabularies
ENCODER = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "initializer_range": 0.1,
}
IMAGES = {**ENCODER, "image_size": 32, "patch_size": 8}
TEXT = {**ENCODER, "vocab_size": WORDS, "max_position_embeddings": 32}
GROUPED = TEXT | {"num_attention_heads": 8, "num_key_value_heads": 4}  # queries, as in Llama
GROUPED |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
STAGES = {"depths": [1, 1, 1, 2], "hidden_sizes": [16, 32, 48, 64]}
SWIN = {
    "image_size": 64,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": (1, 1, 2, 1),
    "num_heads": (2, 2, 4, 4),
    "window_size": 2,
}
FEATURES = {"logits": FULL, "*": SLIM}  # states and caches besides the scores


def entries() -> Iterator[Entry]:
    yield from image_encoders()
    yield from dense()
    yield from image_and_text()
    yield from language()
    yield from sound()
    yield from video()


def image_encoders() -> Iterator[Entry]:
    small = images(32)
    yield model("ViT", "ViTForImageClassification", config("ViT", IMAGES), small)
    yield model("ViT", "ViTModel", config("ViT", IMAGES), small, {"pooler_output": FULL, "*": SLIM})
    yield model("DINOv2", "Dinov2ForImageClassification", config("Dinov2", IMAGES, mlp_ratio=2), small)
    yield model("DINOv2", "Dinov2Model", config("Dinov2", IMAGES, mlp_ratio=2), small, SLIM)
    yield model(
        "DINOv2",
        "Dinov2Backbone",
        config("Dinov2", IMAGES, mlp_ratio=2, out_features=["stage1", "stage2"]),
        small,
        SLIM,
    )
    yield model("DINOv3", "DINOv3ViTModel", config("DINOv3ViT", IMAGES, num_register_tokens=2), small, SLIM)
    yield model("DINOv3", "DINOv3ConvNextModel", config("DINOv3ConvNext", STAGES, image_size=64), images(64), SLIM)
    yield model("Swin", "SwinForImageClassification", config("Swin", SWIN), images(64))
    yield model("Swin", "SwinModel", config("Swin", SWIN), images(64), SLIM)
    yield model("Swin", "SwinBackbone", config("Swin", SWIN, out_features=["stage1", "stage4"]), images(64), SLIM)
    beit = config("Beit", IMAGES, use_relative_position_bias=True)
    yield model("BEiT", "BeitForImageClassification", beit, small)
    yield model("BEiT", "BeitModel", beit, small, SLIM)
    data2vec = config("Data2VecVision", IMAGES, use_relative_position_bias=True)
    yield model("Data2Vec", "Data2VecVisionForImageClassification", data2vec, small)
    yield model("ViTMAE", "ViTMAEForPreTraining", vit_mae, masked_patches, FULL)
    convnext = config("ConvNextV2", STAGES, image_size=64)
    yield model("ConvNeXtV2", "ConvNextV2ForImageClassification", convnext, images(64))
    yield model("ConvNeXtV2", "ConvNextV2Model", convnext, images(64), SLIM)


def dense() -> Iterator[Entry]:
    segformer = config(
        "Segformer", depths=(1, 1, 1, 1), hidden_sizes=(32, 64, 96, 128), num_attention_heads=(1, 2, 3, 4),
        decoder_hidden_size=64, sr_ratios=(4, 2, 1, 1),
    )  # fmt: skip
    yield model("SegFormer", "SegformerForSemanticSegmentation", segformer, images(64))
    yield model("SegFormer", "SegformerForImageClassification", segformer, images(64))
    yield model("SegFormer", "SegformerModel", segformer, images(64), SLIM)
    dpt = config(
        "DPT", IMAGES, num_hidden_layers=4, backbone_out_indices=(0, 1, 2, 3), neck_hidden_sizes=(16, 32, 48, 64),
        fusion_hidden_size=32,
    )  # fmt: skip
    yield model("DPT", "DPTForDepthEstimation", dpt, images(32))
    yield model("DPT", "DPTForSemanticSegmentation", dpt, images(32))
    yield model("UperNet", "UperNetForSemanticSegmentation", uper_net, images(64))
    queries = {"*logits": FULL, "pixel_decoder_last_hidden_state": FULL, "*": SLIM}
    yield model("Mask2Former", "Mask2FormerForUniversalSegmentation", mask2former, images(64), queries)
    yield model("MaskFormer", "MaskFormerForInstanceSegmentation", mask_former, images(64), queries)
    boxes = {"*logits": FULL, "*boxes": FULL, "*class": FULL, "*coord*": FULL, "*reference_points": FULL, "*": SLIM}
    yield model("DETR", "DetrForObjectDetection", detr, masked_images, boxes)
    yield model("RT-DETR", "RTDetrForObjectDetection", rt_detr, images(64), boxes)
    yield model("SAM", "SamModel", sam, prompted, {"iou_scores": FULL, "pred_masks": FULL})


def image_and_text() -> Iterator[Entry]:
    clip = config("CLIP", text_config=TEXT | {"eos_token_id": 2}, vision_config=IMAGES, projection_dim=32)
    yield model(
        "CLIP", "CLIPModel", clip, captioned, {"*logits*": FULL, "*embeds": FULL, "*pooler_output": FULL, "*": SLIM}
    )
    yield model("CLIP", "CLIPVisionModel", config("CLIPVision", IMAGES), images(32), SLIM)
    siglip = config("Siglip", text_config=TEXT | {"projection_size": 64}, vision_config=IMAGES)
    yield model(
        "SigLIP", "SiglipModel", siglip, captioned,
        {"*logits*": FULL, "*embeds": FULL, "*pooler_output": FULL, "*": SLIM},
    )  # fmt: skip
    blip = config("Blip", text_config=TEXT | {"encoder_hidden_size": 64}, vision_config=IMAGES, projection_dim=32)
    yield model(
        "Blip", "BlipModel", blip, captioned,
        {"*logits*": FULL, "*embeds": FULL, "text_model_output.pooler_output": FULL, "*": SLIM},
    )  # fmt: skip
    yield model(
        "Blip", "BlipForConditionalGeneration", blip, captioned, {"decoder_logits": FULL, "logits": FULL, "*": SLIM}
    )
    yield model("LLaVA", "LlavaForConditionalGeneration", llava, illustrated, FEATURES)
    yield model("Qwen2-VL", "Qwen2VLForConditionalGeneration", qwen2_vl, folded, FEATURES)


def language() -> Iterator[Entry]:
    words = partial(sentence, "input_ids", "attention_mask")
    bert = config("Bert", TEXT)
    yield model("BERT", "BertModel", bert, words, {"pooler_output": FULL, "*": SLIM})
    yield model("BERT", "BertForMaskedLM", bert, words)
    yield model("BERT", "BertForSequenceClassification", bert, words)
    data2vec = config("Data2VecText", TEXT, max_position_embeddings=40)
    yield model("Data2Vec", "Data2VecTextForSequenceClassification", data2vec, words)
    gpt = config(
        "GPT2", n_embd=64, n_layer=2, n_head=4, n_positions=32, vocab_size=WORDS, bos_token_id=1, eos_token_id=2
    )
    yield model("GPT-2", "GPT2LMHeadModel", gpt, words, FEATURES)
    yield model("GPT-2", "GPT2Model", gpt, words, SLIM)
    t5 = config(
        "T5", d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=WORDS, decoder_start_token_id=0
    )
    yield model("T5", "T5ForConditionalGeneration", t5, partial(sentence, "input_ids", "decoder_input_ids"), FEATURES)
    yield model("T5", "T5EncoderModel", t5, partial(sentence, "input_ids"), SLIM)
    yield model("Llama", "LlamaForCausalLM", config("Llama", GROUPED), words, FEATURES)
    yield model("Llama", "LlamaModel", config("Llama", GROUPED), words, SLIM)
    yield model("Qwen2", "Qwen2ForCausalLM", config("Qwen2", GROUPED), words, FEATURES)
    yield model(
        "Qwen3", "Qwen3ForCausalLM", config("Qwen3", GROUPED, num_key_value_heads=2, head_dim=16), words, FEATURES
    )
    by_hand = config("Gemma2", GROUPED, head_dim=16, sliding_window=8, attn_implementation="eager")
    yield model("Gemma2", "Gemma2ForCausalLM", by_hand, words, {"*window_tensor": FULL, **FEATURES})
    trocr = config(
        "TrOCR", vocab_size=WORDS, d_model=64, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=128,
        max_position_embeddings=32, cross_attention_hidden_size=64,
    )  # fmt: skip
    yield model("TrOCR", "TrOCRForCausalLM", trocr, words, FEATURES)
    mixtral = GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}
    yield model("Mixtral", "MixtralForCausalLM", config("Mixtral", mixtral), words, FEATURES)
    mamba = config("Mamba", hidden_size=64, num_hidden_layers=2, state_size=8, vocab_size=WORDS)
    yield model("Mamba", "MambaForCausalLM", mamba, partial(sentence, "input_ids"), FEATURES)


def sound() -> Iterator[Entry]:
    whisper = config(
        "Whisper", vocab_size=WORDS, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, num_mel_bins=8, max_source_positions=32,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    yield model("Whisper", "WhisperForConditionalGeneration", whisper, spectrum, FEATURES)
    wave = ENCODER | {
        "vocab_size": WORDS, "conv_dim": (32, 32, 32), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3),
        "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 3,
    }  # fmt: skip
    yield model("Wav2Vec2", "Wav2Vec2ForCTC", config("Wav2Vec2", wave), partial(noise, 2, 800))
    yield model("Wav2Vec2", "Wav2Vec2Model", config("Wav2Vec2", wave), partial(noise, 2, 800), SLIM)
    audio = config("Data2VecAudio", wave, num_conv_pos_embeddings=2, conv_pos_kernel_size=5)
    yield model("Data2Vec", "Data2VecAudioForCTC", audio, partial(noise, 2, 800))


def video() -> Iterator[Entry]:
    clip = partial(noise, 2, 4, 3, 32, 32)
    mae = config(
        "VideoMAE", IMAGES, num_frames=4, decoder_num_attention_heads=2, decoder_hidden_size=32,
        decoder_num_hidden_layers=1, decoder_intermediate_size=64,
    )  # fmt: skip
    yield model("VideoMAE", "VideoMAEForVideoClassification", mae, clip)
    yield model("VideoMAE", "VideoMAEForPreTraining", mae, masked_clip)
    former = config("Timesformer", IMAGES, num_frames=4)
    yield model("TimeSformer", "TimesformerForVideoClassification", former, clip)
    yield model("TimeSformer", "TimesformerModel", former, clip, SLIM)


# -- configurations and inputs
Config = Callable[[], Any]


def model(
    family: str, kind: str, made: Config, example: Callable[[], Any], outputs: str | Mapping[str, str] = FULL
) -> Entry:
    return Entry("transformers", family, kind, partial(_make, kind, made), example, outputs)


def _make(kind: str, made: Config) -> nn.Module:
    made_model = getattr(transformers, kind)(made())
    if kind.startswith("Mixtral"):
        made_model.set_experts_implementation("eager")  # torch's grouped product has no double precision
    return made_model


def config(kind: str, *settings: Mapping[str, Any], **more: Any) -> Config:
    arguments = {name: value for setting in (*settings, more) for name, value in setting.items()}
    if kind not in ("CLIP", "Siglip", "Blip"):
        arguments.setdefault("num_labels", 10)
    return lambda: getattr(transformers, f"{kind}Config")(**arguments)


def vit_mae() -> Any:
    decoder = {"decoder_num_attention_heads": 2, "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1}
    return config("ViTMAE", IMAGES, decoder, decoder_intermediate_size=64, mask_ratio=0.5)()


def uper_net() -> Any:
    backbone = transformers.SwinConfig(**SWIN, out_features=["stage1", "stage2", "stage3", "stage4"])
    return transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=32, auxiliary_in_channels=64, auxiliary_channels=16, num_labels=10
    )


def mask2former() -> Any:
    return transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(**SWIN, out_features=["stage1", "stage2", "stage3", "stage4"]),
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=64, encoder_layers=2,
        decoder_layers=3, num_attention_heads=4, dim_feedforward=64, num_queries=8, num_labels=10,
    )  # fmt: skip


def mask_former() -> Any:
    return transformers.MaskFormerConfig(
        backbone_config=transformers.SwinConfig(**SWIN, out_features=["stage1", "stage2", "stage3", "stage4"]),
        decoder_config=_detr(), fpn_feature_size=32, mask_feature_size=32, num_labels=10,
    )  # fmt: skip


def _detr(**more: Any) -> Any:
    return transformers.DetrConfig(
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_queries=8,
        encoder_attention_heads=4, decoder_attention_heads=4, num_labels=10, **more,
    )  # fmt: skip


def detr() -> Any:
    sizes = {"embedding_size": 32, "hidden_sizes": [32, 64, 96, 128], "depths": [1, 2, 2, 2]}
    return _detr(backbone_config=transformers.ResNetConfig(**sizes, out_features=["stage4"]))


def rt_detr() -> Any:
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
    return transformers.RTDetrConfig(
        backbone_config=transformers.RTDetrResNetConfig(**sizes, out_features=["stage2", "stage3", "stage4"]),
        encoder_hidden_dim=32, encoder_in_channels=[32, 48, 64], encoder_ffn_dim=64, encoder_attention_heads=4,
        d_model=32, num_queries=8, decoder_in_channels=[32, 32, 32], decoder_ffn_dim=64, decoder_attention_heads=4,
        decoder_layers=2, num_labels=10,
    )  # fmt: skip


def sam() -> Any:
    vision = {
        **IMAGES,
        "output_channels": 32,
        "num_pos_feats": 16,
        "window_size": 2,
        "global_attn_indexes": [1],
        "mlp_dim": 128,
    }
    prompt = {"hidden_size": 32, "image_size": 32, "patch_size": 8, "mask_input_channels": 8}
    decoder = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": 32}
    return transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)


IMAGE = 39  # the word that stands for a part of an image


def llava() -> Any:
    return transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**GROUPED), vision_feature_layer=-1, image_token_id=IMAGE,
        vision_config=transformers.CLIPVisionConfig(**IMAGES | {"patch_size": 16}),
    )  # fmt: skip


def qwen2_vl() -> Any:
    turns = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    sight = {"depth": 2, "embed_dim": 64, "num_heads": 4, "patch_size": 8, "spatial_merge_size": 2, "mlp_ratio": 2}
    return transformers.Qwen2VLConfig(
        text_config=GROUPED | {"rope_parameters": turns}, vision_config=sight | {"hidden_size": 64},
        image_token_id=IMAGE, video_token_id=38, vision_start_token_id=37, vision_end_token_id=36,
    )  # fmt: skip


def illustrated() -> dict[str, Tensor]:
    found = sentence("input_ids", "attention_mask")
    found["input_ids"].clamp_(max=35)[:, 2:6] = IMAGE
    return found | {"pixel_values": noise(2, 3, 32, 32)}


def folded() -> dict[str, Tensor]:
    found = {name: each[:1] for name, each in illustrated().items() if name != "pixel_values"}
    image = {"pixel_values": noise(16, 3 * 2 * 8 * 8), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return found | image | {"mm_token_type_ids": (found["input_ids"] == IMAGE).long()}


def images(size: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": noise(2, 3, size, size)}


def masked_images() -> dict[str, Tensor]:
    return {"pixel_values": noise(2, 3, 64, 64), "pixel_mask": torch.ones(2, 64, 64, dtype=torch.long)}


def masked_patches() -> dict[str, Tensor]:
    return {"pixel_values": noise(2, 3, 32, 32), "noise": noise(2, 16)}


def masked_clip() -> dict[str, Tensor]:
    return {
        "pixel_values": noise(2, 4, 3, 32, 32),
        "bool_masked_pos": torch.arange(32).remainder(2).bool().repeat(2, 1),
    }


def prompted() -> dict[str, Tensor]:
    return {"pixel_values": noise(2, 3, 32, 32), "input_points": torch.tensor([[[[8.0, 9.0]]], [[[20.0, 4.0]]]])}


def sentence(*names: str) -> dict[str, Tensor]:
    found = {name: tokens(2, 12, vocabulary=WORDS) for name in names}
    return found | {name: torch.ones_like(found[name]) for name in names if name == "attention_mask"}


def captioned() -> dict[str, Tensor]:
    return sentence("input_ids", "attention_mask") | {"pixel_values": noise(2, 3, 32, 32)}


def spectrum() -> dict[str, Tensor]:
    return {"input_features": noise(2, 8, 64), "decoder_input_ids": tokens(2, 6, vocabulary=WORDS)}


def version() -> tuple[str, str]:
    return "transformers", transformers.__version__
