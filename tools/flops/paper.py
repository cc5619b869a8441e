"""Published figures of models."""

# name: (parameters in M, GMACs, ImageNet top-1 in %) as printed in the paper
PAPER = {
    "visformer_tiny": ("10.3", "1.3", "78.6"),
    "visformer_small": ("40.2", "4.9", "82.2"),
    "swin_visformer_tiny_v2": ("9.4", "1.3", "79.6"),
    "swin_visformer_small_v2": ("23.6", "4.3", "83.0"),
    "convit_tiny": ("6", "1", "73.1"),
    "convit_tiny_plus": ("10", "2", "76.7"),
    "convit_small": ("27", "5.4", "81.3"),
    "convit_small_plus": ("48", "10", "82.2"),
    "convit_base": ("86", "17", "82.4"),
    "convit_base_plus": ("152", "30", "82.5"),
    "fastvit_t8": ("3.6", "0.7", "75.6"),
    "fastvit_t12": ("6.8", "1.4", "79.1"),
    "fastvit_s12": ("8.8", "1.8", "79.8"),
    "fastvit_sa12": ("10.9", "1.9", "80.6"),
    "fastvit_sa24": ("20.6", "3.8", "82.6"),
    "fastvit_sa36": ("30.4", "5.6", "83.6"),
    "fastvit_ma36": ("42.7", "7.9", "83.9"),
}
# published ImageNet top-1 in %, also of DeiT (arXiv 2012.12877), Swin (2103.14030) and ConvNeXt
# (2201.03545), to compare
TOP1 = {name: float(top1) for name, (_, _, top1) in PAPER.items()} | {
    "deit_tiny_patch16_224": 72.2,
    "deit_small_patch16_224": 79.8,
    "deit_base_patch16_224": 81.8,
    "swin_tiny_patch4_window7_224": 81.3,
    "convnext_tiny": 82.1,
}
