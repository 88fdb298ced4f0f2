"""Does recording, adapting and placing hold for every model type that transformers registers?

`build` makes a tiny random model of a type and a prompt that shows it a picture; `recording`,
`adapting` and `painting` each check one thing and raise `Mismatch`; `table` runs them and says in
one line per type what is true. Used by `avl models --check` and by the tests, so that any installed
version of transformers can be asked.
"""
