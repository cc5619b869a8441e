"""Start ``main.py`` on a Slurm cluster, and again after every preemption or timeout."""
