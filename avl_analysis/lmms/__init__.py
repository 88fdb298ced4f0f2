"""lmms-eval with a policy: real benchmarks, with physical bytes, keys read and times beside scores.

`plugin` registers models with lmms-eval through its entry point group `lmms_eval.models`; `tally`
counts what every answer cost and fails loudly; `local_task` writes questions as a task folder;
`results` reads result files. lmms-eval itself is optional and imported by `plugin` only.
"""
