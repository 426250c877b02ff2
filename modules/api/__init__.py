"""HTTP: the OpenAI-compatible API, the page's own API, and what stands in front of both."""
