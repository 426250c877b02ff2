"""Many requests from a file, in OpenAI's batch-file format, by any loader.

lines.py   a line of input, a line of output
files.py   the input as numbered lines; the output that survives a kill
runner.py  as many lines at once as the worker runs; retries; pause; progress
jobs.py    the server's batches, kept under the data folder
cli.py     server.py batch IN.jsonl OUT.jsonl
"""
