# The paper's probe: one 1 x 1 convolution on us6 (CleanDIFT, section 5). Here predictions are upsampled bilinearly, by
# mmsegmentation; the paper takes the nearest neighbour.
data_preprocessor = dict(
    type="SegDataPreProcessor",
    mean=[127.5, 127.5, 127.5],  # [-1, 1]
    std=[127.5, 127.5, 127.5],
    bgr_to_rgb=True,
    pad_val=0,
    seg_pad_val=255,
    size_divisor=64,
)
model = dict(
    type="EncoderDecoder",
    data_preprocessor=data_preprocessor,
    backbone=dict(
        type="cleandift_backbones.CleanDIFT",
        model_name="cleandift_sd21",
        out_indices=["us6"],
        frozen=True,
        dtype="bfloat16",
        save_frozen=False,
    ),
    decode_head=dict(
        type="FCNHead",
        num_convs=0,
        concat_input=False,
        in_channels=1280,
        channels=1280,
        in_index=0,
        dropout_ratio=0.0,
        num_classes=150,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
