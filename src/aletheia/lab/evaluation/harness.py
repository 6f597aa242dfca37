"""Runs inside the sandbox: a solution, then its tests, then the proof that the tests ended.

Standard input carries three parts, each after its length (8 hexadecimal digits): solution, tests, nonce. The solution
finds an empty standard input. Only when the last test has returned, the nonce is written to standard output, and the
process exits at once. So exiting early, printing a success message or catching exceptions proves nothing.

Passed as text to an interpreter that cannot import this package.
"""

import builtins
import os
import sys


def _main() -> None:
    # what the tests and the proof rely on is saved before the solution can replace it
    execute, translate, read, write, leave = exec, compile, os.read, os.write, os._exit
    set_trace, set_profile = sys.settrace, sys.setprofile
    number, length = int, len
    live = vars(builtins)
    pristine = dict(live)
    channel, out = os.dup(0), os.dup(1)
    empty, end = os.pipe()  # there is no /dev/null
    os.dup2(empty, 0)
    os.close(empty)
    os.close(end)

    def part() -> bytes:
        size, found = number(read(channel, 8), 16), b""
        while length(found) < size:
            found += read(channel, size - length(found))
        return found

    # no "__main__": a solution's own demonstration stays off, as in the reference implementation of HumanEval
    module = type(sys)("solution")
    sys.modules["solution"] = module
    namespace = vars(module)
    execute(translate(part().decode(), "solution.py", "exec", dont_inherit=True, optimize=0), namespace)

    set_trace(None)
    set_profile(None)
    live.clear()
    live.update(pristine)
    namespace["__builtins__"] = pristine
    execute(translate(part().decode(), "tests.py", "exec", dont_inherit=True, optimize=0), namespace)
    write(out, part())
    leave(0)


if __name__ == "__main__":
    _main()
