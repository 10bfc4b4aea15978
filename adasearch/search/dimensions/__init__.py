"""Kinds of search dimension, one per file: how a knob, or several together, become search parameters.

Entry: ``parameters(path: str, options) -> dict[str, Parameter]``, the parameters by name, in order. Names start with
`path`. Facts of an entry:

- ``decode(values: dict[str, Scalar], path: str, options) -> item``: what is laid into the trial at `path`; total, any
  value of the parameters gives an item.
- ``encode(item, path: str, options) -> dict[str, Scalar]``: the values that decode to `item`; ValueError says why
  there are none.

In a space file a dimension is ``{kind: domain, setting: ...}``. A domain that is a mapping holds options; any other is
the first option.
"""
