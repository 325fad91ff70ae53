"""From a prompt to text: templates, the decoding loop, generation, the runner."""
