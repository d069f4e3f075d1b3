"""The SwinV2 that the model section describes."""

from __future__ import annotations

from swinv2_train.config import ConfigError, ModelConfig, pair
from swinv2_train.models import SwinTransformerV2, swin_v2


def build_model(config: ModelConfig, num_classes: int, head_dropout: float = 0.0) -> SwinTransformerV2:
    """The SwinV2 of the model section; a size that does not fit together is a ConfigError."""
    own = {key: getattr(config, key) for key in ("embed_dim", "depths", "num_heads", "extra_norm_period")}
    try:
        return swin_v2(
            config.name,
            img_size=pair("model.img_size", config.img_size),
            patch_size=config.patch_size,
            in_chans=config.in_chans,
            num_classes=num_classes,
            window_size=pair("model.window_size", config.window_size),
            mlp_ratio=config.mlp_ratio,
            drop_path_rate=config.drop_path_rate,
            head_dropout=head_dropout,
            pretrained_window_sizes=config.pretrained_window_sizes,
            frames=config.frames,
            patch_frames=config.patch_frames,
            window_frames=config.window_frames,
            pretrained_window_frames=config.pretrained_window_frames,
            clamp_to_shorter_side=config.clamp_to_shorter_side,
            fused_attention=config.attention == "fused",
            sequential_stages=config.sequential_stages,
            attention_chunk_windows=config.attention_chunk_windows,
            attention_chunk_mib=config.attention_chunk_mib,
            **{key: value for key, value in own.items() if value is not None},
        )
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error
