"""What the profiler hands to the runner: neuron files and fit files, where they are found, which model they belong to."""
