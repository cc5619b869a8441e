"""Inductor's code for CUDA: made for a GPU, or for a device that computes nothing."""


def test_a_compiled_step_is_one_graph_of_kernels_made_for_it(count_on_device):
    flags = ["test_vit", "--batch-size", 4, "--input-size", 160, "--compile", "inductor"]
    (found,) = count_on_device("step", *flags)
    assert (found["graphs"], found["breaks"], found["recompilations"]) == (1, 0, 0)
    assert 50 < found["triton"] < found["operations"]
    assert not {key for key in found if "sync" in key or "h2d" in key}, found
