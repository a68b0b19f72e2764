"""What a model costs: its traced workload, and the models of energy, area and time that read it."""
