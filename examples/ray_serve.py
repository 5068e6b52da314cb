"""Serves a model with Ray Serve: the HTTP API of `nanovllm serve`, with several replicas behind one address.

    python examples/ray_serve.py --model tiny --replicas 2

It starts Ray on this machine, or joins the cluster that RAY_ADDRESS names. Ctrl-C ends it when the running requests
have ended. Ray's own command needs no script, but this one has an `app` for it too:

    serve run examples.ray_serve:app
    serve run nanovllm.integrations.ray:build_app model=tiny device=cpu num_replicas=2
"""

from __future__ import annotations

import argparse
import signal

import ray
from ray import serve

from nanovllm.integrations.ray import build_app

NAME = "nanovllm"

app = build_app({"model": "tiny", "device": "cpu", "num_replicas": 2})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a folder, a Hugging Face id, or 'tiny' (default)")
    parser.add_argument("--replicas", type=int, default=2, help="engines, each with a GPU or a core (default 2)")
    parser.add_argument("--port", type=int, default=8000, help="default 8000")
    args = parser.parse_args()

    ray.init()
    device = "auto" if ray.cluster_resources().get("GPU") else "cpu"
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": args.port})
        options = {"model": args.model, "device": device, "num_replicas": args.replicas}
        serve.run(build_app(options), name=NAME)
        address = f"http://127.0.0.1:{args.port}"
        print(f"Serving {args.model} at {address}, until Ctrl-C. A request:\n")
        print(f"curl -N {address}/v1/chat/completions -H 'Content-Type: application/json' \\")
        print(
            '    -d \'{"messages": [{"role": "user", "content": "count from 7 to 15"}], "stream": true}\'', flush=True
        )
        signal.pause()
    except KeyboardInterrupt:
        print("Waiting for the running requests to end.", flush=True)
    finally:
        serve.delete(NAME)
        ray.shutdown()


if __name__ == "__main__":
    main()
