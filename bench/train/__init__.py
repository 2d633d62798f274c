"""``train`` and ``demo``: a task is a file; one trainer; a folder keeps the run."""
