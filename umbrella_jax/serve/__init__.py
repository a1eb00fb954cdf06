"""A local server: a page to ask a model about scans and to look at them, and an API in OpenAI's form."""
