"""The parts of structured logging. `nanovllm.utils.logger` is what the rest of the package uses.

records          a sentence and named fields, made by one call
events, fields   every event that nanovllm logs, and what its fields mean
levels           reads NANOVLLM_LOG_LEVEL
formats          a record as a line of text, or as a JSON object
handlers         the console and the log file
lost_lines       the warning about a file that cannot be written
progress_bar     the bar of `LLM.generate`, which gives way to lines
configuration    applies the environment to Python's logging
timed_sections   how long a block of code took
decode_rule      which decode steps get a line at INFO
"""
