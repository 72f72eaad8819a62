"""The HTTP endpoint: options of vLLM, requests that are let in, images that are taken."""
