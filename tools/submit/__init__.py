"""Run ``main.py`` on a Slurm cluster, requeued after every preemption or timeout."""
