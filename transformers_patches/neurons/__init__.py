"""What the profiler hands to the runner: neuron files and fit files, where they are, and whose model they belong to."""
