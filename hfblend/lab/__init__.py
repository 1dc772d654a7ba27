"""Benchmark, evaluation, baselines and the paper's observations, on top of the package.

baselines.py  other ways to prefill a prompt, as methods with names
rivals.py     what others have published since: rules and algorithms; those that ask the question are in probes.py
texts.py      texts that chunk KV is computed after, as some of them have it
settings.py   what to measure: methods, ratios, and the settings of both runs
clock.py      turns, memory, the machine's peak rates
bench/        time to first token, loading, decoding, streams, batches; random models and prompts
eval/         closeness to full prefill and answers, on questions
report.py     results as Markdown
plots.py      results as figures
insights.py   deviation by layer, rank correlation, attention
"""
