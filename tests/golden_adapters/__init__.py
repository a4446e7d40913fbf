"""From a reference vector to limbeck's public functions.

Every module of this folder may define

``ADAPTERS``: ``{(system, function): adapter}`` where ``adapter(case)`` returns a value for each ``out_*``
array of the file, under the same name;
``IGNORED``: ``{(system, function): {out_name: reason}}`` for outputs that the file itself calls wrong.

A ``case`` gives ``case["x"]`` (a tensor), ``case.leaf("x")`` (the same, requiring grad), ``case.grads(loss,
x=x)`` (``{"out_grad_x": ...}``), ``case.weights("prefix_")`` (tensors by the rest of their name),
``case.args`` and ``"x" in case``.
"""
