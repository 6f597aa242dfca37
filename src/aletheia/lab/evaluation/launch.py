"""The first code in a sandboxed process: it sets the limits, then becomes the program.

Passed as text to an interpreter that cannot import this package. Limits are set here and not by the parent, because
a hook between fork and exec can deadlock in a parent with threads.
"""

import os
import resource
import select
import sys


def _set_limits(pairs: list[str]) -> None:
    """Set limits, each given as ``RLIMIT_NAME=value``; also the hard limits, so that they cannot be raised again."""
    for pair in pairs:
        name, value = pair.split("=")
        kind = getattr(resource, name, None)
        if kind is None or (sys.platform == "darwin" and name == "RLIMIT_AS"):
            continue  # absent on this system; systems with a sandbox have all of them
        hard = resource.getrlimit(kind)[1]
        soft = int(value)
        # one more second before SIGKILL, so that SIGXCPU shows the parent why the program ended
        last = soft + 1 if name == "RLIMIT_CPU" else soft
        if hard != resource.RLIM_INFINITY:
            soft, last = min(soft, hard), min(last, hard)
        resource.setrlimit(kind, (soft, last))


def _is_orphan() -> bool:
    """Whether nobody reads the output: the parent was killed before bubblewrap tied this process to it."""
    output = select.poll()
    output.register(1, 0)  # errors only
    return bool(output.poll(0))


def _main() -> None:
    if _is_orphan():
        return
    path, *pairs = sys.argv[1:]
    sys.argv = [path]
    with open(path, "rb") as handle:
        source = handle.read()
    os.closerange(3, 4096)
    _set_limits(pairs)
    exec(compile(source, path, "exec", dont_inherit=True), {"__name__": "__main__", "__builtins__": __builtins__})


if __name__ == "__main__":
    _main()
