"""Programs that attack the sandbox or the score. Each is a "solution" whose test asks for ``solve(2) == 4``.

``attempt`` prints BREACH when something that must not be possible was possible, and ``refused`` otherwise. The words
CANARY, MARKER, HOME, CWD, PARENT, PORT, SOCKET, PROJECT between two @ are filled in by the test.
"""

PRELUDE = """
import ctypes, os, signal, socket, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def attempt(action, *arguments):
    try:
        found = action(*arguments)
    except (OSError, RuntimeError, ImportError, MemoryError) as error:
        return print("refused", type(error).__name__, flush=True)
    print("BREACH", action, arguments, repr(found)[:80], flush=True)
def call(name, *arguments):
    if getattr(libc, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)
def write(path):
    with open(path, "w") as handle:
        handle.write("MARKER")
"""

# Attacks on the machine: every attempt is refused.
REFUSED = {
    "fork": "attempt(os.fork)",
    "fork by vfork": "attempt(call, 'vfork')",
    "fork by raw clone": "attempt(call, 'syscall', 56 if os.uname().machine == 'x86_64' else 220, 17, 0, 0, 0, 0)",
    "fork by clone3": "attempt(call, 'syscall', 435, bytes(88), 88)",
    "fork bomb": "for _ in range(10_000):\n    try: os.fork()\n    except OSError: pass\nattempt(os.fork)",
    "daemon by double fork": "def daemon():\n"
    "    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0: time.sleep(600)\n        os._exit(0)\n"
    "attempt(daemon)",
    "threads bomb": "import threading\n"
    "for _ in range(50): attempt(threading.Thread(target=time.sleep, args=(60,)).start)",
    "shell": "import subprocess\nattempt(subprocess.run, ['/bin/sh', '-c', 'echo @MARKER@ > /tmp/x'])\n"
    "attempt(os.execv, '/bin/sh', ['sh'])",
    "spawn": "attempt(os.posix_spawn, sys.executable, [sys.executable], {})",
    "multiprocessing": "import multiprocessing\nattempt(multiprocessing.Process(target=print).start)",
    "memory by list": "attempt(lambda: [0] * (1 << 34))",
    "memory by growth": "def grow():\n    kept = []\n    while True: kept.append(bytearray(1 << 22))\nattempt(grow)",
    "memory by bytes": "attempt(bytes, 1 << 34)",
    "memory by mmap": "import mmap\nattempt(mmap.mmap, -1, 1 << 34)",
    "memory by memfd": "attempt(os.memfd_create, 'x')",
    "memory by System V": "attempt(call, 'shmget', 0, ctypes.c_size_t(1 << 20), 0o1600)",
    "raise own limits": "import resource\n"
    "def up(kind):\n"
    "    try: resource.setrlimit(kind, (resource.RLIM_INFINITY,) * 2)\n"
    "    except ValueError as error: raise OSError from error\n"
    "attempt(up, resource.RLIMIT_AS)\nattempt(up, resource.RLIMIT_CPU)",
    "huge file": "def fill():\n"
    "    with open('/tmp/x', 'wb') as f:\n        while True: f.write(bytes(1 << 20))\nattempt(fill)",
    "many files": "def fill():\n"
    "    for i in range(100):\n        open(f'/tmp/{i}', 'wb').write(bytes(1 << 20))\nattempt(fill)",
    "write to the root": "attempt(write, '/@MARKER@')",
    "write to home": "attempt(write, '@HOME@/@MARKER@')\nattempt(os.makedirs, '@HOME@/@MARKER@')",
    "write to the working directory": "attempt(write, '@CWD@/@MARKER@')",
    "write to the interpreter": "attempt(write, sys.executable)\nattempt(write, os.__file__)",
    "write to the library folder": "attempt(write, os.path.dirname(os.__file__) + '/@MARKER@')",
    "write to shared memory": "attempt(write, '/dev/shm/@MARKER@')",
    "read the canary": "attempt(open, '@CANARY@')\nattempt(os.stat, '@CANARY@')",
    "write the canary": "attempt(open, '@CANARY@', 'w')\nattempt(os.remove, '@CANARY@')",
    "read passwords": "for name in ('shadow', 'passwd', 'hostname'): attempt(open, '/etc/' + name)",
    "symlink escape": "os.symlink('@CANARY@', '/tmp/link')\n"
    "attempt(open, '/tmp/link')\nattempt(open, '/tmp/link', 'w')",
    "hard link escape": "attempt(os.link, '@CANARY@', '/tmp/link')\nattempt(os.link, sys.executable, '/tmp/link')",
    "dots escape": "attempt(open, '/tmp/' + '../' * 40 + '@CANARY@'.lstrip('/'))",
    "root of process 1": "attempt(open, '/proc/1/root@CANARY@')\nattempt(open, '/proc/1/cwd/../..@CANARY@')",
    "memory of process 1": "attempt(open, '/proc/1/mem', 'r+b')",
    "walk the descriptors": "for fd in range(256): attempt(open, f'/proc/self/fd/{fd}/../..@CANARY@')",
    "folders behind descriptors": "for fd in range(3, 64): attempt(os.listdir, fd)",
    "kernel settings": "attempt(open, '/proc/sys/kernel/core_pattern', 'w')\nattempt(open, '/proc/sysrq-trigger', 'w')",
    "score for the memory killer": "attempt(open, '/proc/self/oom_score_adj', 'w')",
    "physical memory": "for name in ('mem', 'kmem', 'port', 'kmsg', 'vda', 'sda'): attempt(open, '/dev/' + name, 'rb')",
    "device nodes": "attempt(os.mknod, '/tmp/disk', 0o60600, os.makedev(254, 0))\n"
    "attempt(os.chmod, '/dev/null', 0o666)",
    "network": "attempt(socket.create_connection, ('192.0.2.1', 80), 1)",
    "loopback": "attempt(socket.create_connection, ('127.0.0.1', @PORT@), 1)",
    "name lookup": "attempt(socket.getaddrinfo, 'example.org', 80)",
    "unix socket": "attempt(lambda: socket.socket(socket.AF_UNIX).connect('@SOCKET@'))",
    "abstract socket": "attempt(lambda: socket.socket(socket.AF_UNIX).connect('\\0@MARKER@'))",
    "raw and netlink sockets": "attempt(socket.socket, 17, 3, 0)\nattempt(socket.socket, 16, 3, 0)\n"
    "attempt(socket.socket, 38, 5, 0)",
    "signal to the parent": "attempt(os.kill, @PARENT@, 9)",
    "trace": "attempt(call, 'ptrace', 16, 1, 0, 0)",
    "become root": "attempt(os.setuid, 0)\nattempt(os.setgid, 0)",
    "change root": "attempt(os.chroot, '/tmp')\nattempt(call, 'chroot', b'/tmp')",
    "mount": "attempt(call, 'mount', b'none', b'/tmp', b'tmpfs', 0, 0)\nattempt(call, 'umount2', b'/tmp', 2)",
    "remount for writing": "attempt(call, 'mount', 0, b'/', 0, 32 | 4096, 0)",
    "new namespace": "for kind in (0x10000000, 0x20000, 0x40000000): attempt(call, 'unshare', kind)",
    "join a namespace": "attempt(lambda: call('setns', os.open('/proc/1/ns/net', os.O_RDONLY), 0))",
    "kernel modules and eBPF": "nr = (175, 321, 425) if os.uname().machine == 'x86_64' else (105, 280, 425)\n"
    "for number in nr: attempt(call, 'syscall', number, 0, 0, 0)",
    "new system calls": "attempt(call, 'syscall', 460, 0)\nattempt(call, 'syscall', 0x40000000 + 57, 0)",
    "import the project": "sys.path += ['@PROJECT@']\nattempt(__import__, 'aletheia')\nattempt(__import__, 'torch')",
    "import from site-packages": "sys.path.append(os.path.dirname(os.__file__) + '/site-packages')\n"
    "attempt(__import__, 'pip')\nattempt(__import__, 'setuptools')",
    "secrets in the environment": "attempt(lambda: os.environ['ALETHEIA_SECRET'] if 'ALETHEIA_SECRET' in os.environ "
    "else open('/nothing'))\n"
    "for pid in (1, os.getpid()):\n"
    "    if 'ALETHEIA_SECRET' in open(f'/proc/{pid}/environ').read(): print('BREACH')",
}

# Programs that end badly or never: the reason, and the exit they come to.
ENDED = {
    "endless loop": ("cpu time", "while True: pass"),
    "endless loop that ignores SIGXCPU": (
        "failed",  # the hard limit, a second later
        "signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
    ),
    "sleep that ignores signals": (
        "wall time",
        "for s in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGHUP): signal.signal(s, signal.SIG_IGN)\n"
        "time.sleep(600)",
    ),
    "sleep that catches exceptions": (
        "wall time",
        "while True:\n    try: time.sleep(600)\n    except BaseException: pass",
    ),
    "closed descriptors": ("wall time", "os.closerange(0, 64)\ntime.sleep(600)"),
    "endless stdout": ("output", "while True: print('x' * 4096)"),
    "endless stderr": ("output", "while True: os.write(2, b'x' * 4096)"),
    "huge exception message": ("output", "raise ValueError('x' * (1 << 24))"),
    "reading stdin": ("failed", "input()"),
    "invalid UTF-8": ("failed", "os.write(1, bytes(range(128, 256)) * 8)"),
    "deep recursion": ("failed", "def f(): return f()\nf()"),
    "stack overflow in C": (
        "failed",
        "x = ()\nfor _ in range(10 ** 6): x = (x,)\nhash(x)",
    ),
    "abort": ("failed", "os.abort()"),
    "null pointer": ("failed", "ctypes.string_at(0)"),
    "kill everything": ("failed", "os.kill(-1, 9)\nos.kill(os.getppid(), 9)\nos.kill(0, 9)"),
    "stop itself": ("wall time", "os.kill(os.getpid(), signal.SIGSTOP)"),
    "regular expression that never ends": ("cpu time", "import re\nre.match('(a*)*b', 'a' * 64)"),
    "huge integer": ("cpu time", "x = 7 ** (10 ** 9)"),
    "NUL in the source": ("failed", "x = 1\0"),
    "half a surrogate pair": ("failed", "x = '\ud800'"),
    "nesting": ("failed", "x = " + "(" * 10_000),
}

# Attacks on the score: the program ends as it likes, but does not pass.
CHEATS = {
    "sys.exit(0)": "sys.exit(0)",
    "os._exit(0)": "os._exit(0)",
    "exit in the function": "def solve(x): sys.exit(0)",
    "hard exit in the function": "def solve(x): os._exit(0)",
    "fake success": "print('passed', 'ok', '0' * 32, flush=True)\nos._exit(0)",
    "fake success at exit": "import atexit\natexit.register(lambda: (print('f' * 32, flush=True), os._exit(0)))",
    "caught exceptions": "sys.excepthook = lambda *a: None\ntry: solve(2)\nexcept BaseException: pass",
    "exit from the exception hook": "sys.excepthook = lambda *a: os._exit(0)",
    "no AssertionError": "import builtins\nclass Never(BaseException): pass\nbuiltins.AssertionError = Never\n"
    "def solve(x): return 5",
    "patched builtins": "import builtins\nfor name in ('exec', 'compile', 'len', 'int'):\n"
    "    setattr(builtins, name, lambda *a, **k: 4)\ndef solve(x): return 5",
    "patched unittest": "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\ndef solve(x): return 5",
    "trace function": "def trace(frame, event, argument):\n"
    "    if frame.f_code.co_filename == 'tests.py': frame.f_lineno = 99\n    return trace\n"
    "sys.settrace(trace)\ndef solve(x): return 5",
    "profile function": "sys.setprofile(lambda *a: os._exit(0) if a[1] == 'call' else None)\ndef solve(x): return 5",
    "own check": "def check(candidate): pass\ndef solve(x): return 5",
    "check written from the function": "def solve(x):\n    globals().update(check=lambda c: None)\n    return 5",
    "signal at the end": "signal.signal(signal.SIGALRM, lambda *a: os._exit(0))\nsignal.alarm(1)\n"
    "def solve(x): time.sleep(5)",
    "optimised tests": "sys.flags\nimport builtins\nvars(builtins)['__debug__'] = False\ndef solve(x): return 5",
    "wrong": "def solve(x): return 5",
    "nothing": "",
}
