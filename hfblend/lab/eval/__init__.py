"""`hfblend eval`: quality and speed of every method on questions, with confidence intervals; see docs/quality.md."""
