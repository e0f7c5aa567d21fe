"""One file per framework, which imports that framework and the core, nothing else."""
