"""nanovllm in a Ray cluster."""

from nanovllm.integrations.ray.serve import build_app as build_app
