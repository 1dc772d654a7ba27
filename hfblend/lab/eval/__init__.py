"""Quality and speed of every method on a set of questions, with confidence intervals; `hfblend eval`.

    data.py      questions and their passages, from files or by name; the prompt they become
    metrics.py   answers against references, and the bootstrap
    runner.py    the measurements, question by question
    records.py   the file that keeps them, so that a run can go on where it was cut off
    summary.py   measurements -> one row per method and ratio
    report.py    rows -> Markdown and a picture
    command.py   what `hfblend eval` does

docs/evaluation.md says how to run it and what each figure is.
"""
