"""What the pipeline asks of a Slurm cluster, and says of its jobs there. Imports nothing slow."""
