# screen.py WORD... -- COMMAND...: runs a command on a terminal of 240 columns, presses q when its screen shows all the words, and
# ends with 0 if the command does
import fcntl, os, pty, re, select, struct, sys, termios, time
split = sys.argv.index("--")
wanted, command = {word.encode() for word in sys.argv[1:split]}, sys.argv[split + 1:]
pid, screen = pty.fork()
if pid == 0:
    os.environ["TERM"] = "xterm"
    os.execv(command[0], command)
fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 240, 0, 0))
seen, end, pressed = b"", time.time() + 55, False
while time.time() < end:
    # The screen shows words one by one, with commands of the terminal between them.
    if not pressed and wanted <= set(re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b" ", seen).split()):
        os.write(screen, b"q")
        pressed = True
    if select.select([screen], [], [], 0.2)[0]:
        try:
            more = os.read(screen, 65536)
        except OSError:
            break
        if not more:
            break
        seen += more
_, status = os.waitpid(pid, os.WNOHANG if not pressed else 0)
if not pressed:
    print(seen)
sys.exit(0 if pressed and status == 0 else 1)
