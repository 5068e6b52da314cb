"""The bodies of requests, as pydantic models, and of answers, as typed dictionaries; one file a family of endpoints."""
