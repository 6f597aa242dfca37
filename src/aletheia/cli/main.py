"""The command ``aletheia``: whatever happens, one line and an exit code. Little is imported before that holds."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

DEBUG = "ALETHEIA_DEBUG"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main() -> NoReturn:
    """Entry point: exit code 0; 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM, or what an error asks for.

    1 stands for results that are no success (failed rows, say) and for a fault of ours.
    """
    caught: list[int] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        caught.append(signum)
        raise KeyboardInterrupt

    on_main_thread = threading.current_thread() is threading.main_thread()
    earlier = {signum: signal.signal(signum, stop) for signum in SIGNALS} if on_main_thread else {}
    try:
        from aletheia.cli.terminal import open_outputs

        open_outputs()
        code = _run()
        sys.stdout.flush()  # now, while a full disk can still be said
    except BaseException as error:
        for signum in earlier:  # a second Ctrl-C is to change nothing any more
            signal.signal(signum, signal.SIG_IGN)
        message, code = _told(error, caught)
        if os.environ.get(DEBUG) and not isinstance(error, SystemExit):
            import traceback

            traceback.print_exception(error)
        if message:
            from aletheia.names import printable

            print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)
        from aletheia.cli.terminal import lose_output

        lose_output()
    finally:
        for signum, handler in earlier.items():
            signal.signal(signum, handler)
    sys.exit(code)


def _run() -> int:
    from aletheia.libraries import quiet_libraries

    arguments = sys.argv[1:]
    if arguments[:1] == ["--debug"]:
        os.environ[DEBUG] = "1"
    if not os.environ.get(DEBUG):
        quiet_libraries()
    from aletheia.cli.app import run

    return run()


def _told(error: BaseException, caught: list[int]) -> tuple[str, int]:
    """The line and the exit code of what ended the command."""
    if isinstance(error, SystemExit):
        return "", error.code if isinstance(error.code, int) else int(error.code is not None)
    if caught and getattr(error, "exit_code", None) is None:  # a library may have turned it into an error of its own
        return "interrupted; the same command goes on or begins anew", 128 + caught[0]
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command goes on or begins anew", 130
    from aletheia.cli.faults import told

    return told(error)
