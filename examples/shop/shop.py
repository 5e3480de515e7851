#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""A small service in Python for a profiler to measure, beside the shop in C: `shop.py [LOAD] [SECONDS]`.

It handles made-up requests, the same at each run, and keeps to a share of the CPU (LOAD, percent of one core, 20). Half of
the work is Python code; the rest is C code that calls Python code again (`sorted` with a key) or does not (`json`).
"""

import json
import signal
import sys
import time


class Cart:
    def __init__(self, number):
        self.lines = [{"item": f"item {(number * 7 + at) % 97}", "price": (number + at * 13) % 50 + 1} for at in range(40)]

    def total(self):
        total = 0
        for line in self.lines:
            total += discount(line["price"])
        return total


def discount(price):
    return price - price // 10 if price > 25 else price


def rank(line):
    return -discount(line["price"]), line["item"]


def render(cart):
    best = sorted(cart.lines, key=rank)[:10]
    return json.dumps({"total": cart.total(), "best": best})


def handle(number):
    cart = Cart(number)
    return len(json.loads(render(cart))["best"])


def main():
    load = float(sys.argv[1]) if len(sys.argv) > 1 else 20.0
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else float("inf")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    begin, number = time.monotonic(), 0
    while time.monotonic() - begin < seconds:
        for number in range(number, number + 20):
            handle(number)
        # Sleeps until the CPU time so far is the share of the time so far.
        time.sleep(max(0.001, time.process_time() * 100 / load - (time.monotonic() - begin)))


if __name__ == "__main__":
    main()
