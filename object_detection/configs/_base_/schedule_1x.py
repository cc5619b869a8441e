"""AdamW in mixed precision for 12 epochs of COCO, 16 images per step."""

_base_ = "mmdet::_base_/schedules/schedule_1x.py"

optim_wrapper = dict(
    _delete_=True,
    type="AmpOptimWrapper",
    loss_scale="dynamic",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    # no decay of norms, whatever their names, of biases of attention and of position embeddings
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        custom_keys=dict(
            norm=dict(decay_mult=0.0),
            relative_position_bias_table=dict(decay_mult=0.0),
            pos_embed=dict(decay_mult=0.0),
        ),
    ),
)
