"""Measuring models: perplexity, speed, memory, answers side by side and zero-shot tasks, kept so that runs can be compared.

plan       what a run is asked for              runner     one run: each model in a worker of its own, one after another
texts      data sets and how they are joined    jobs       runs of the server, which belong to no connection
windows    how a text is cut and counted        report, plots   the table, Markdown, CSV, SVG
questions  for answers side by side             agreement  how far two answers agree
subject    one model in its worker              measure    perplexity, speed, answers of it
store      user_data/evaluations                environment     hardware and versions of a run
cli, bench_cli      `server.py evaluate`, `server.py bench`
harness    lm-evaluation-harness, with harness_child in an environment of its own
"""
