"""Training tasks: data, model, trainer and the record that a run leaves, one file each."""
