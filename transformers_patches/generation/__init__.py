"""From a prompt to text: templates, the decoding loop, generation, the runner. (Not called `generate`: that is a function.)"""
