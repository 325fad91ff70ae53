"""The OpenAI-compatible server and its chat page: `partinfer.py --function serve`. Needs requirements-serve.txt."""
