# The backbone learns the more slowly the earlier a layer runs: a tenth of the head's rate, times 0.8 per block.
optim_wrapper = dict(
    type="AmpOptimWrapper",
    dtype="bfloat16",
    optimizer=dict(type="AdamW", lr=1e-4, weight_decay=1e-2),
    clip_grad=dict(max_norm=1.0),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,  # of neck and heads: mmengine applies it where no custom key does
        custom_keys={
            "backbone.model.unet.up_blocks.3": dict(lr_mult=0.1),
            "backbone.model.unet.up_blocks.2": dict(lr_mult=0.08),
            "backbone.model.unet.up_blocks.1": dict(lr_mult=0.064),
            "backbone.model.unet.up_blocks.0": dict(lr_mult=0.0512),
            "backbone.model.unet.mid_block": dict(lr_mult=0.041),
            "backbone.model.unet.down_blocks.3": dict(lr_mult=0.0328),
            "backbone.model.unet.down_blocks.2": dict(lr_mult=0.0262),
            "backbone.model.unet.down_blocks.1": dict(lr_mult=0.021),
            "backbone.model.unet.down_blocks.0": dict(lr_mult=0.0168),
            "backbone.model.unet": dict(lr_mult=0.0134),  # conv_in, time_embedding
        },
    ),
)
