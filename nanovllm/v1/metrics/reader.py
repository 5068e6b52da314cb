"""vLLM's place of `Counter`, `Gauge`, `Histogram`, `Metric` and `Vector`."""

from nanovllm.metrics import Counter as Counter
from nanovllm.metrics import Gauge as Gauge
from nanovllm.metrics import Histogram as Histogram
from nanovllm.metrics import Metric as Metric
from nanovllm.metrics import Vector as Vector
