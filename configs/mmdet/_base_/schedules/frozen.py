# Only the heads are trained.
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=5e-4, weight_decay=1e-4),
    clip_grad=dict(max_norm=1.0),
)
