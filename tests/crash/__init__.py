"""Kill a training run repeatedly, resume it, and compare it bitwise with an undisturbed one."""
