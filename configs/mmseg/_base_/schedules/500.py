param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=25),
    dict(type="PolyLR", eta_min=0.0, power=0.9, by_epoch=False, begin=25, end=500),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=500, val_interval=250)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=25, log_metric_by_epoch=False),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=250),
    visualization=dict(type="SegVisualizationHook"),
)
