"""The report on a JSON log: a page, or the answer to one question in words.

    python -m nanovllm.report run.jsonl -o report.html
    python -m nanovllm.report run.jsonl --request ID | --slowest N | --step N | --summary | --compare other.jsonl

The log is written with `NANOVLLM_LOG_FORMAT=json NANOVLLM_LOG_FILE=run.jsonl`; at DEBUG it has each step.
It is read line by line (`log_file`) into bins, quantile sketches and samples of a fixed size (`quantiles`), with one
`Run` for each engine in it (`run`, `requests`, `preemptions`, `statistics`, `steps`). What limited the run, and which
setting changes that, is computed from a `Run` (`verdict`, `advice`). Answers (`answer`, `answer_step`, `answer_run`,
`comparison`) and the page (`charts`, `gantt`, `sections`, `page`) show the same figures. The page is one HTML file with
inline SVG, which needs no network.

The report only reads what the engine has logged, and imports neither the engine nor torch.
"""
