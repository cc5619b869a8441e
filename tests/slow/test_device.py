"""Training and inference on CUDA: a GPU, or a device that is not there and computes nothing."""

import pytest

NETS = ("visformer_small", "swin_visformer_small_v2", "convit_small", "fastvit_sa12")
NETS += ("vit_base_patch16_224",)


@pytest.mark.parametrize("sm", [80, 89, 90, 100])
def test_no_attention_falls_back_to_plain_products(count_on_device, sm):
    found = count_on_device("attention", *NETS, options=["--sm", sm])
    assert {line["model"] for line in found} == set(NETS)
    for line in found:
        assert "math" not in line["chosen"] and "none" not in line["chosen"], line
        assert sum(line["chosen"].values()) == line["layers"] > 0, line
