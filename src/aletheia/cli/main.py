"""The command ``aletheia``: every error ends in one line and an exit code. Few imports come before that holds."""

import os
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from types import FrameType

DEBUG = "ALETHEIA_DEBUG"
INTERRUPTED = "interrupted; the same command resumes from what was saved, or starts from the beginning"


def main() -> NoReturn:
    """Entry point: exit code 0; 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM, or what an error asks for.

    1 means an unsuccessful result, such as failed rows, or a bug in Aletheia.
    """
    caught: list[int] = []
    earlier = {}
    try:
        import signal
        import threading

        def stop(signum: int, frame: "FrameType | None") -> None:
            caught.append(signum)
            raise KeyboardInterrupt

        if threading.current_thread() is threading.main_thread():
            earlier = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
        from aletheia.cli.terminal import open_outputs

        open_outputs()
        code = _run()
        if caught:  # the command-line library made it an exit code
            raise KeyboardInterrupt
        sys.stdout.flush()  # now, while a full disk can still be reported
    except BaseException as error:
        for signum in earlier:  # a second Ctrl-C must change nothing any more
            signal.signal(signum, signal.SIG_IGN)
        code = _end(error, caught)
    finally:
        for signum, handler in earlier.items():
            signal.signal(signum, handler)
    sys.exit(code)


def _run() -> int:
    from aletheia.libraries import quiet_libraries

    if sys.argv[1:2] == ["--debug"]:
        os.environ[DEBUG] = "1"
    if not os.environ.get(DEBUG):
        quiet_libraries()
    from aletheia.cli.app import run

    return run()


def _end(error: BaseException, caught: list[int]) -> int:
    """Print in one line what ended the command; returns its exit code."""
    from aletheia.cli.terminal import lose_output

    message, code = _message_and_code(error, caught)
    if os.environ.get(DEBUG) and not isinstance(error, SystemExit):
        import traceback

        traceback.print_exception(error)
    if message:
        from aletheia.names import printable

        print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)
    lose_output()
    return code


def _message_and_code(error: BaseException, caught: list[int]) -> tuple[str, int]:
    """The line and the exit code of what ended the command."""
    if isinstance(error, SystemExit):
        return "", error.code if isinstance(error.code, int) else int(error.code is not None)
    has_own_code = getattr(error, "exit_code", None) is not None
    if isinstance(error, KeyboardInterrupt) or (caught and not has_own_code):  # or what a library raised for it
        return INTERRUPTED, 128 + (caught[0] if caught else 2)
    from aletheia.cli.faults import message_and_code

    return message_and_code(error)
