"""Works in spans of ddtrace and records each: thread, trace, span, function, local root span; first "ready"."""

import os
import threading

from ddtrace import tracer


def burn():
    total = 0
    for i in range(300_000):
        total += i
    return total


def spin_0():
    return burn()


def spin_1():
    return burn()


def spin_2():
    return burn()


def outside():
    return burn()


def work():
    count = 0
    while True:
        spin = (spin_0, spin_1, spin_2)[count % 3]
        count += 1
        with tracer.trace("root") as root:
            with tracer.trace("child") as child:
                facts = (threading.get_native_id(), child.trace_id, child.span_id, spin.__name__, root.span_id)
                # At once: two threads write.
                os.write(1, b"%d %032x %016x %b %016x\n" % (*facts[:3], facts[3].encode(), facts[4]))
                spin()
        outside()


print("ready", flush=True)
threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
