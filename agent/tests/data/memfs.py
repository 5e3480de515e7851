# memfs.py MOUNTPOINT: a file system in memory; after SIGUSR1 it takes each request and never answers, so that the caller
# cannot even be killed
import ctypes, os, signal, struct, sys
answers = True
def never_answer(*_):
    global answers
    answers = False
signal.signal(signal.SIGUSR1, never_answer)
mnt, dev, libc = sys.argv[1], os.open("/dev/fuse", os.O_RDWR), ctypes.CDLL(None, use_errno=True)
opts = f"fd={dev},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
if libc.mount(b"memfs", mnt.encode(), b"fuse", 0, opts): sys.exit(os.strerror(ctypes.get_errno()))
# A directory has a dict of names and nodes, a file has its bytes.
nodes, last = {1: {}}, 1
def attr(ino):
    node = nodes[ino]
    mode, size = (0o040700, 0) if isinstance(node, dict) else (0o100600, len(node))
    return struct.pack("<6Q10I", ino, size, size // 512 + 1, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
def entry(ino): return struct.pack("<4Q2I", ino, 0, 0, 0, 0, 0) + attr(ino)
def made(parent, name, content):
    global last
    last += 1
    nodes[last] = content
    nodes[parent][name] = last
    return last
opened = struct.pack("<QII", 0, 0, 0)
while True:
    try: req = os.read(dev, 1 << 20)
    except OSError: break                                              # unmounted
    if not answers: continue
    _, op, unique, node = struct.unpack_from("<IIQQ", req)
    body, err, out = req[40:], 0, b""
    names = lambda skip: body[skip:].split(b"\0")
    if op in (2, 36, 42): continue                                     # forget, interrupt
    elif op == 26: out = struct.pack("<4I2H2I", 7, 31, 0, 0, 16, 12, 1 << 17, 1).ljust(64, b"\0")   # init
    elif op == 1: err, out = (0, entry(nodes[node][names(0)[0]])) if names(0)[0] in nodes[node] else (-2, b"")
    elif op == 3: out = struct.pack("<Q2I", 0, 0, 0) + attr(node)
    elif op == 4:                                                      # setattr
        valid, _, _, size = struct.unpack_from("<IIQQ", body)
        if valid & 8: nodes[node] = nodes[node][:size].ljust(size, b"\0")
        out = struct.pack("<Q2I", 0, 0, 0) + attr(node)
    elif op == 9: out = entry(made(node, names(8)[0], {}))             # mkdir
    elif op in (10, 11): nodes[node].pop(names(0)[0])                  # unlink, rmdir
    elif op in (12, 45):                                               # rename
        to, (old, new) = struct.unpack_from("<Q", body)[0], names(8 if op == 12 else 16)[:2]
        nodes[to][new] = nodes[node].pop(old)
    elif op in (14, 27): out = opened
    elif op == 35: out = entry(made(node, names(16)[0], b"")) + opened # create
    elif op == 15: _, at, size = struct.unpack_from("<QQI", body); out = nodes[node][at:at + size]
    elif op == 16:                                                     # write
        _, at, size = struct.unpack_from("<QQI", body)
        nodes[node] = nodes[node][:at].ljust(at, b"\0") + body[40:40 + size] + nodes[node][at + size:]
        out = struct.pack("<II", size, 0)
    elif op == 28:                                                     # readdir
        at = struct.unpack_from("<QQI", body)[1]
        for index, (name, ino) in list(enumerate(nodes[node].items()))[at:at + 16]:
            out += (struct.pack("<QQII", ino, index + 1, len(name), 0) + name).ljust(24 + (len(name) + 7) // 8 * 8, b"\0")
    elif op == 17: out = struct.pack("<5Q10I", 1 << 20, 1 << 20, 1 << 20, 1 << 20, 1 << 20, 4096, 255, 4096, 0, 0, 0, 0, 0, 0, 0)
    elif op in (18, 20, 25, 29, 30): pass                              # release, fsync, flush
    else: err = -38
    os.write(dev, struct.pack("<IiQ", 16 + len(out), err, unique) + out)
