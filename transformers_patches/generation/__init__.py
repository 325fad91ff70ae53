"""From a prompt to text: templates, the decoding loop, generation, the runner, the Python interface.

Not called `generate`: that is a function of the package.
"""
