//! Configurations of networks that several tests train.

/// Small, with classes and attention.
pub const PLAIN: &str = r#"{"sample_size": 8, "in_channels": 3, "out_channels": 3, "layers_per_block": 1,
    "block_out_channels": [16, 32], "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "attention_head_dim": 16, "norm_num_groups": 4,
    "num_class_embeds": 2}"#;

/// Resnets that resample, a norm's scale and shift by time, padding on one side only, another activation.
pub const ODD: &str = r#"{"sample_size": 8, "in_channels": 2, "out_channels": 2, "layers_per_block": 1,
    "block_out_channels": [12, 20], "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"], "attention_head_dim": 4, "norm_num_groups": 4,
    "resnet_time_scale_shift": "scale_shift", "act_fn": "mish", "downsample_padding": 0}"#;
