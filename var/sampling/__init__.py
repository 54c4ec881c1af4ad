"""K responses per prompt, from a model in this process, vLLM or a server."""
